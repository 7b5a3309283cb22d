"""The text files of a checkpoint, and what its index says of them. Imports no torch."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from megalite import __version__
from megalite.checkpoint.checksum import checksum
from megalite.checkpoint.folder import (
    INDEX_FILE,
    STATE_FILE,
    CheckpointError,
    DamagedCheckpointError,
    parse_json,
    read_file,
)
from megalite.checkpoint.untrusted import size_in

FORMAT_VERSION = 2
"""That is written. Version 1, without checksums of tensors, is read too."""

_CHECKSUM_ENTRY = ',"xxh3":"'


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and checksum of a file."""

    bytes: int
    xxh3: str | None = None
    """Of a text file: of all; of a rank's file: of its header. None in version 1."""
    private: dict[str, str] = field(default_factory=dict)
    """Of a rank's file: the checksums of each private tensor, as of a shard."""
    sha256: str | None = None
    """Of all; in version 1."""


def read_text_file(folder: Path, name: str) -> bytes:
    """The content of a text file of a checkpoint, compared with the checkpoint's index.

    Raises DamagedCheckpointError when either cannot be read, or they do not fit; CheckpointError
    when a later version of megalite wrote them.
    """
    content = read_file(folder / name)
    index = folder / INDEX_FILE
    files = parse_index(read_file(index), index).get("files")
    listed = None
    try:
        item = files[name]
        listed = StoredFile(size_in(item["bytes"]), item.get("xxh3"), sha256=item.get("sha256"))
    except (LookupError, TypeError, ValueError, AttributeError):
        pass  # compare_text says that it is not listed
    compare_text(folder / name, listed, content)
    return content


def read_state_file(folder: Path) -> dict:
    """state.json of a checkpoint. Raises as `read_text_file`."""
    return parse_json(read_text_file(folder, STATE_FILE), folder / STATE_FILE)


def compare_text(path: Path, file: StoredFile | None, content: bytes) -> None:
    """Raise DamagedCheckpointError unless a text file has the size and checksum of the index."""
    if file is None:
        raise DamagedCheckpointError(f"{path.with_name(INDEX_FILE)} does not list {path.name}")
    if len(content) != file.bytes:
        instead = f"instead of {file.bytes}"
        raise DamagedCheckpointError(f"{path} has {len(content)} bytes {instead}")
    if file.xxh3 is not None:
        is_same = checksum(content) == file.xxh3
    else:
        is_same = hashlib.sha256(content).hexdigest() == file.sha256
    if not is_same:
        raise DamagedCheckpointError(f"{path} differs from its checksum")


def parse_index(text: bytes, source: object) -> dict:
    """The JSON object of an index, which has the checksum that it states.

    Raises DamagedCheckpointError when it is damaged, CheckpointError when a later version of
    megalite wrote it.
    """
    raw = parse_json(text, source)
    version = raw.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        writer = raw.get("written_by", "a later megalite")
        raise CheckpointError(
            f"{source} has format version {version} and was written by {str(writer)[:80]}; "
            f"this is megalite {__version__}, which reads versions 1 to {FORMAT_VERSION}: "
            "use the version that wrote it, or a later one"
        )
    if version == FORMAT_VERSION and not has_checksum(text):
        raise DamagedCheckpointError(f"{source} is damaged: it differs from its checksum")
    return raw


def with_checksum(text: str) -> str:
    """A JSON object with its checksum as last entry: that of the text before that entry."""
    before = text.removesuffix("}")
    return f'{before}{_CHECKSUM_ENTRY}{checksum(before.encode())}"}}'


def has_checksum(text: bytes) -> bool:
    """Whether a text ends with its checksum."""
    before, _, after = text.rpartition(_CHECKSUM_ENTRY.encode())
    return after.rstrip() == f'{checksum(before)}"}}'.encode()
