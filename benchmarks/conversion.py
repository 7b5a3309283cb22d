#!/usr/bin/env python
"""Converting a model of 1 GiB from and to Hugging Face, beside the disk.

    OMP_NUM_THREADS=1 python benchmarks/conversion.py --folder FOLDER     # on the disk to measure

A Llama of 16 layers, hidden 1024, in fp32, with random weights that transformers writes, is
converted to megalite and back, in turn with a copy of the file in pieces of 16 MiB. What is read
has been dropped from the page cache (posix_fadvise) and comes from the disk; what is written is
written through to it (fsync). Each conversion runs in a process of its own, after its imports.
Prints medians over the rounds, ratios within a round with their spread, and the memory that a
conversion adds to the process at most, with the mapped pages of files.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout

PIECE = 16 << 20
"""Bytes that a copy reads and writes at once."""


def write_model(folder: Path) -> None:
    """A Llama with random weights, by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def convert(from_format: str, to: str, load: Path, save: Path) -> tuple[float, float]:
    """(seconds, MiB of memory that it adds) of a conversion, in a process of its own."""
    # What a conversion imports. The program imports torch and these only when it needs them.
    import megalite.checkpoint.load
    import megalite.convert.huggingface
    import megalite.convert.write
    import megalite.data.tokenizers  # noqa: F401
    from megalite.programs.convert_checkpoint import Options
    from megalite.programs.convert_checkpoint import convert as run

    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = status("VmRSS")
    began = time.perf_counter()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        run(Options(from_format=from_format, to=to, load=str(load), save=str(save)))
    seconds = time.perf_counter() - began
    return seconds, status("VmHWM") - before


def status(key: str) -> float:
    """MiB of memory of this process: VmRSS, what it has, or VmHWM, at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {key}")


def copy(load: Path, save: Path) -> float:
    """Seconds to read and write as many bytes."""
    began = time.perf_counter()
    save.mkdir()
    buffer = memoryview(bytearray(PIECE))
    for path in load.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as source, open(save / path.name, "wb") as target:
            while count := source.readinto(buffer):
                target.write(buffer[:count])
            target.flush()
            os.fsync(target.fileno())
    return time.perf_counter() - began


def drop_from_page_cache(folder: Path) -> None:
    """The next read of these files comes from the disk."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def in_own_process(*arguments: object) -> tuple[float, float]:
    """`convert` of these arguments."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(convert, *arguments).result()


def main() -> None:
    """Read the flags, convert in turn and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=".", help="where to write, on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side is measured")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"copy": [], "hf to megalite": [], "megalite to hf": []}
    memory: dict[str, list[float]] = {"hf to megalite": [], "megalite to hf": []}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="conversion-") as name:
        folder = Path(name)
        published = folder / "published"
        write_model(published)
        mib = sum(path.stat().st_size for path in published.glob("*.safetensors")) / 2**20
        for _ in range(options.rounds):
            drop_from_page_cache(published)
            seconds["copy"].append(copy(published, folder / "copy"))
            there = ("hf", "megalite", published, folder / "ours")
            back = ("megalite", "hf", folder / "ours", folder / "back")
            for from_format, to, load, save in (there, back):
                drop_from_page_cache(load)
                took, added = in_own_process(from_format, to, load, save)
                seconds[f"{from_format} to {to}"].append(took)
                memory[f"{from_format} to {to}"].append(added)
            for made in ("copy", "ours", "back"):
                shutil.rmtree(folder / made)
    print(f"| {mib:.0f} MiB | MiB/s | of a copy | memory, MiB |\n|---|---|---|---|")
    for side, times in seconds.items():
        ratios = [raw / own for raw, own in zip(seconds["copy"], times)]
        middle = statistics.median(ratios)
        speed = f"{mib / statistics.median(times):.0f}"
        spread = f"{middle:.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        added = f"{statistics.median(memory[side]):.0f}" if side in memory else ""
        print(f"| {side} | {speed} | {spread} | {added} |")


if __name__ == "__main__":
    main()
