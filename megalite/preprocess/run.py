"""Preprocessing as a whole: from the inputs to the datasets of every key."""

from collections.abc import Callable, Iterator

from megalite.data.indexed import DatasetError, DatasetInfo
from megalite.preprocess.config import PreprocessConfig
from megalite.preprocess.encode import TextReader
from megalite.preprocess.inputs import expand, read_blocks, shard_ranges
from megalite.preprocess.partitions import make_in_partitions
from megalite.preprocess.progress import Progress
from megalite.preprocess.shard import BadLineError, make_shard


def preprocess(
    config: PreprocessConfig, report: Callable[[Progress], None] = lambda progress: None
) -> list[DatasetInfo]:
    """Write the datasets of every key and return their descriptions; `report` is called after every block.

    Nothing has its final name before everything is written. What an interrupted run of the same job wrote is kept.
    After an error, the folder is there if the same call would go on from it.
    Raises BadLineError at a line that is no document and one too many, DatasetError when an output exists, an input
    cannot be read, or another job's output is in the way, TokenizerError when the fast tokenizer is wrong.
    """
    files, problems = expand(config.input)
    if problems:
        raise DatasetError("; ".join(problems))
    make = make_in_partitions if config.partitions > 1 else make_shard
    make(config, files, report)
    return [DatasetInfo.read(config.prefix(key)) for key in config.json_keys]


def read_texts(inputs: tuple[str, ...], key: str) -> Iterator[str]:
    """Every text of the inputs, for those who learn from it. Raises BadLineError at a line that is no document."""
    files, problems = expand(inputs)
    if problems:
        raise DatasetError("; ".join(problems))
    reader, file, line = TextReader((key,)), -1, 1
    for block in read_blocks(files, shard_ranges(files, 0, 1), (key,)):
        line = 1 if block.file != file else line
        lines, texts, bad = reader.parse(block.read(), block.is_text)
        if bad:
            raise BadLineError(f"{block.path}, line {line + bad[0][0]}: {bad[0][1]}")
        yield from texts[0]
        file, line = block.file, line + lines
