"""Configurations to check, the files they name, and assertions on the problems that are found."""

import re
from pathlib import Path

import numpy as np
import pytest

from megalite.checkpoint.checksum import checksum
from megalite.checkpoint.format import Index
from megalite.checkpoint.text_files import StoredFile
from megalite.config import cli, validate
from megalite.config.flags import read_flags
from megalite.config.problem import ConfigError, Problem
from megalite.config.run import RunConfig, from_flat, options, with_values
from megalite.data.indexed import DatasetInfo
from megalite.models.presets import preset
from megalite.preprocess.indexed_writer import IndexedWriter

SOUND = {"mock_data": True, "vocab_size": 512, "train_iters": 10}
BERT = {"architecture": "bert"}


def fixed(config: RunConfig, world_size: int, problem: Problem) -> list[tuple[str, RunConfig, int]]:
    """(offer, configuration, ranks) for each offer of the fix that can be typed."""
    results = []
    for offer in problem.fix.split(", or "):
        if ranks := re.fullmatch(r"start (\d+) ranks", offer):
            results.append((offer, config, int(ranks[1])))
        elif left_out := re.fullmatch(r"leave out (--\S+)", offer):
            key = next(o.key for o in options().values() if left_out[1] in o.flags)
            usual = preset(config.model.preset).get(key, options()[key].default)
            results.append((offer, with_values(config, {key: usual}), world_size))
        elif offer.endswith("(once the other problems are fixed)"):
            continue
        elif (
            re.match(r"--[a-z0-9-]+($| [^A-Z ]*$| [0-9 ]+($| --)| \S+ --)", offer)
            and " of " not in offer
        ):
            values, problems = read_flags(offer.split(), options().values())
            assert not problems, offer
            results.append((offer, with_values(config, values), world_size))
    return results


def assert_one_problem(
    config: RunConfig, world_size: int, words: str, least_offers: int = 1
) -> None:
    """There is one problem, it has these words, and every offer of its fix repairs it and causes no
    other."""
    problems = validate.check(config, world_size)
    assert len(problems) == 1, problems
    for word in words.split():
        assert word in problems[0].message, problems[0]
    offers = fixed(config, world_size, problems[0])
    assert len(offers) >= least_offers, problems[0]
    for offer, repaired, ranks in offers:
        assert validate.check(repaired, ranks) == [], offer


def write_dataset(prefix: str, documents: int, info: DatasetInfo | None, dtype=np.uint16) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for number in range(documents):
            writer.add_document(np.full(100, number, dtype))
        writer.finish(info)


def write_index(step: Path) -> None:
    """The index of a checkpoint of text files alone: those that are in the folder."""
    files = {}
    for path in step.iterdir():
        content = path.read_bytes()
        files[path.name] = StoredFile(len(content), checksum(content))
    (step / "index.json").write_text(Index(0, 1, {}, files).to_json())


def checkpoint(folder, *iterations: int, latest=None) -> None:
    """What the rules look at of a checkpoint folder."""
    for iteration in iterations:
        step = folder / f"iter_{iteration:07d}"
        step.mkdir(parents=True)
        write_index(step)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(latest or iterations[-1]))


REAL = {
    "data_path": "corpus",
    "tokenizer_type": "ByteTokenizer",
    "train_iters": 10,
    "seq_length": 64,
}
QUIET = {"eval_interval": 0, "eval_iters": 0}


def real(**changes) -> RunConfig:
    return from_flat(REAL | {"split": "80,20,0"} | changes)


def problems_of(*argv: str) -> list[str]:
    """The problems of a command line."""
    with pytest.raises(ConfigError) as caught:
        cli.read_config(list(argv))
    return [f"{p.message} | {p.fix}" for p in caught.value.problems]


def write(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


def another_value(option):
    """A value that is not the option's default."""
    if option.kind is bool:
        return not option.default
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    return {int: 7, float: 0.25, str: "somewhere", tuple: ("0.3", "some where", "0.7", "-else")}[
        option.kind
    ]
