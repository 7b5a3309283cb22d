#!/usr/bin/env python
"""About 115 MB of English from Debian's documentation packages, as JSONL documents of about 2 kB.

    python benchmarks/english.py english.jsonl --megabytes 100

Dictionaries (GCIDE, WordNet), the Python manual and the Linux kernel's documentation: prose, markup
and code. Needs apt-get and dpkg-deb, and downloads 75 MB; nothing is installed.
"""

import argparse
import gzip
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("dict-gcide", "dict-wn", "python3.11-doc", "linux-doc-6.1")
PATTERNS = (
    "usr/share/dictd/*.dict.dz",
    "usr/share/info/python*.info*.gz",
    "usr/share/doc/linux-doc-6.1/**/*.gz",
)


def texts(folder: Path) -> Iterator[str]:
    """The text of every file of the unpacked packages, in the order of their names."""
    for pattern in PATTERNS:
        for path in sorted(folder.glob(pattern)):
            if "translations" not in path.parts and path.is_file():
                yield gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")


def documents(folder: Path, size: int = 2000) -> Iterator[str]:
    """Paragraphs, gathered until a document has this many characters."""
    gathered = []
    length = 0
    for text in texts(folder):
        for paragraph in filter(None, map(str.strip, text.split("\n\n"))):
            gathered.append(paragraph)
            length += len(paragraph)
            if length >= size:
                yield "\n\n".join(gathered)
                gathered = []
                length = 0


def main() -> None:
    """Download, unpack, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--megabytes", type=float, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, f"{folder}/all"], check=True)
        written = 0
        with args.output.open("w", encoding="utf-8") as out:
            for document in documents(Path(folder, "all")):
                written += out.write(json.dumps({"text": document}) + "\n")
                if written >= args.megabytes * 1e6:
                    break
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
