"""Stopping and resuming: to the bit in the same layout, whatever ends the run; to rounding in another one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = """
    --mock-data --vocab-size 131 --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32
    --micro-batch-size 1 --global-batch-size 8 --train-iters 12 --lr 1e-2 --lr-warmup-iters 3 --eval-interval 4
    --eval-iters 1 --device cpu
""".split()
EIGHT_RANKS = "--tp 2 --pp 2 --sp".split()


def command(ranks: int, *flags: str) -> list[str]:
    """pretrain_gpt.py on this many ranks; one rank needs no launcher."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, str(ROOT / "pretrain_gpt.py"), *MODEL, *map(str, flags)]


def train(ranks: int, *flags: str) -> str:
    """Run to the end; the console's text. Fails with the output when the run fails."""
    done = subprocess.run(command(ranks, *flags), capture_output=True, text=True, timeout=180, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(path: Path) -> list[tuple]:
    """What must not change: everything but times."""
    timing = ("step_seconds", "tokens_per_second")
    return [tuple((k, v) for k, v in line.items() if k not in timing) for line in lines(path)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Metrics of a run of one process with dropout that nobody stops."""
    path = tmp_path_factory.mktemp("undisturbed") / "metrics.jsonl"
    train(1, "--metrics-file", path)
    return path


def test_exit_interval_and_resume_to_the_bit(tmp_path, undisturbed):
    flags = ["--save", tmp_path / "c", "--load", tmp_path / "c", "--metrics-file", tmp_path / "m.jsonl"]
    first = train(1, *flags, "--exit-interval", "5")
    assert "starting from scratch" in first and "stopped at iteration 5: --exit-interval 5" in first
    assert "resumed from" in train(1, *flags)
    assert curve(tmp_path / "m.jsonl") == curve(undisturbed)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
def test_a_signal_saves_and_the_run_goes_on_to_the_bit(tmp_path, undisturbed, which):
    flags = ["--save", tmp_path / "c", "--load", tmp_path / "c", "--metrics-file", tmp_path / "m.jsonl"]
    run = subprocess.Popen(command(1, *flags), stdout=subprocess.PIPE, text=True, env=environment())
    wait_for(lambda: (tmp_path / "m.jsonl").exists() and (tmp_path / "m.jsonl").read_text().count("\n") >= 2)
    run.send_signal(which)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and f": {which.name}" in output
    assert len(list((tmp_path / "c").glob("iter_*"))) == 1
    train(1, *flags)
    assert curve(tmp_path / "m.jsonl") == curve(undisturbed)


def test_killed_runs_lose_nothing_that_was_saved(tmp_path, undisturbed):
    """SIGKILL at moments that may lie inside a save: each next run starts from a whole checkpoint and ends the same."""
    flags = ["--save", tmp_path / "c", "--load", tmp_path / "c", "--save-interval", "1"]
    for attempt in range(4):
        path = tmp_path / f"{attempt}.jsonl"
        run = subprocess.Popen(command(1, *flags, "--metrics-file", path), stdout=subprocess.DEVNULL, env=environment())
        wait_for(lambda: (path.exists() and path.stat().st_size > 0) or run.poll() is not None)
        time.sleep(0.003 * attempt)
        run.kill()
        run.wait()
    train(1, *flags, "--metrics-file", tmp_path / "last.jsonl")
    latest = {}
    for path in [*(tmp_path / f"{attempt}.jsonl" for attempt in range(4)), tmp_path / "last.jsonl"]:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            latest[entry["iteration"], "loss" in entry] = {k: v for k, v in entry.items() if "second" not in k}
    wanted = {(dict(line)["iteration"], "loss" in dict(line)): dict(line) for line in curve(undisturbed)}
    assert latest == wanted


def test_eight_ranks_stop_and_resume_to_the_bit(tmp_path):
    """dp=2 x tp=2 x pp=2 with sequence parallelism, dropout and bf16: undisturbed, and stopped in the middle."""
    layout = [*EIGHT_RANKS, "--bf16", "--recompute-granularity", "selective"]
    train(8, *layout, "--metrics-file", tmp_path / "whole.jsonl")
    flags = [*layout, "--save", tmp_path / "c", "--load", tmp_path / "c", "--metrics-file", tmp_path / "parts.jsonl"]
    train(8, *flags, "--exit-interval", "7")
    train(8, *flags)
    assert curve(tmp_path / "parts.jsonl") == curve(tmp_path / "whole.jsonl")


def wait_for(condition, seconds: float = 60.0) -> None:
    """Poll until the condition holds; fail after a time that only a broken run needs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)
