#!/usr/bin/env python
"""Step times of this checkout and of another one, each trained by its own program, in turn.

    OMP_NUM_THREADS=1 python benchmarks/versions.py ../megalite-before
    OMP_NUM_THREADS=1 python benchmarks/versions.py ../megalite-before --ranks 2 \\
        -- --tensor-model-parallel-size 2

Flags after `--` are added to both runs; both versions must know them. Prints the median step of
each round, and the ratio of the two versions with its spread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
MODEL = """
    --num-layers 8 --hidden-size 512 --num-attention-heads 8 --seq-length 256 --vocab-size 8192
    --micro-batch-size 4 --global-batch-size 8 --mock-data --device cpu --lr 1e-4
    --eval-interval 0 --eval-iters 0
""".split()


def median_step(checkout: Path, steps: int, ranks: int, flags: list[str]) -> float:
    """Train in a temporary folder; the median seconds of a step, without the first two."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, str(checkout / "pretrain_gpt.py"), *MODEL]
        command += ["--train-iters", str(steps), "--metrics-file", str(metrics), *flags]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [line["step_seconds"] for line in lines if "step_seconds" in line]
    return statistics.median(seconds[2:])


def main() -> None:
    """Read the arguments, run both versions in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="iterations of a run, at least 3")
    parser.add_argument("--ranks", type=int, default=1)
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    flags = arguments[end + 1 :]
    ratios = []
    for index in range(options.rounds):
        checkouts = [HERE, options.other.resolve()]
        seconds = {}
        for checkout in checkouts if index % 2 == 0 else reversed(checkouts):
            seconds[checkout] = median_step(checkout, options.steps, options.ranks, flags)
        here, other = (seconds[checkout] for checkout in checkouts)
        ratios.append(other / here)
        print(f"round {index + 1}: here {here:.3f} s, other {other:.3f} s a step", flush=True)
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    print(f"other / here: {middle:.3f} ({least:.3f} .. {most:.3f}); above 1, this one is faster")


if __name__ == "__main__":
    main()
