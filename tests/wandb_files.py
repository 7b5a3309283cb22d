"""Reading what Weights & Biases wrote offline: a header of 7 bytes, then a log in LevelDB's
format."""

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32768


def wandb_records(path: Path) -> Iterator:
    """The records of a .wandb file. A record that spans blocks comes in pieces: first, middle,
    last."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place < len(data):
        if BLOCK - place % BLOCK < 7:  # too short for a header: padding
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(path: Path) -> list[dict[str, float]]:
    """The rows that were logged."""
    import json

    rows = [record.history.item for record in wandb_records(path) if record.HasField("history")]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row}
        for row in rows
    ]
