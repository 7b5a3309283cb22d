"""Preprocessing as a whole: from the inputs to the datasets of every key."""

from collections.abc import Callable, Iterator

from megalite.data.indexed import DatasetInfo
from megalite.preprocess.config import PreprocessConfig
from megalite.preprocess.encode import TextReader
from megalite.preprocess.inputs import display_name, input_files, read_blocks, shard_ranges
from megalite.preprocess.partitions import write_partitions
from megalite.preprocess.progress import PreprocessProgress
from megalite.preprocess.shard import BadLineError, open_journal, write_shard


def preprocess(
    config: PreprocessConfig, report: Callable[[PreprocessProgress], None] = lambda progress: None
) -> list[DatasetInfo]:
    """Write the datasets of every key.

    Files get their final names when all are complete. What an interrupted run of the same job
    wrote is kept. After an error, the staging directory remains if the same call would resume from
    it.

    Args:
        config: what to read and how to encode it.
        report: called after every block.

    Returns:
        The description of each key's dataset.

    Raises:
        BadLineError: at a bad line, one more than may be left out.
        DatasetError: an output exists, an input cannot be read, or another job's staging
            directory is in the way.
        TokenizerError: the fast tokenizer backend gives wrong ids.
    """
    files = input_files(config.input)
    write = write_partitions if config.partitions > 1 else write_shard
    with open_journal(config, files) as journal:
        if journal.is_complete:
            report(PreprocessProgress.restored(journal.state.get("progress", {})))
        else:
            write(config, files, journal, report)
        journal.publish()
    return [DatasetInfo.read(config.prefix(key)) for key in config.json_keys]


def read_texts(inputs: tuple[str, ...], key: str, skip_empty: bool = False) -> Iterator[str]:
    """Every text of the inputs, for example to train a tokenizer.

    Args:
        inputs: files, folders and patterns, as --input takes them.
        key: key of the JSON objects, or column, that holds the text.
        skip_empty: pass over blank lines and empty texts instead of raising.

    Raises:
        BadLineError: at a line that is not a document.
        DatasetError: an input cannot be read.
    """
    files = input_files(inputs)
    reader = TextReader((key,))
    line = 1
    for block in read_blocks(files, shard_ranges(files), (key,)):
        if block.start == 0:
            line = 1
        parsed = reader.parse(block.read(), block.is_text)
        for bad in parsed.bad:
            if not (skip_empty and bad.is_empty):
                name = display_name(block.path)
                raise BadLineError(f"{name}, line {line + bad.number}: {bad.reason}")
        yield from parsed.texts[0]
        line += parsed.lines
