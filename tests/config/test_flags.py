"""Every flag changes what it is for: a flag has an entry in FLAGS, or the test fails.

An entry has a base and a value; the program runs with the base, and with the value besides. The
checks compare what a user sees of the two: the metrics file and the console without times, and the
files written; or, where that is not the point of a flag, memory, order or exit.
"""

from typing import Any

import pytest
import torch

from megalite.config.run import options
from megalite.programs.convert_checkpoint import Options, convert
from tests import runs
from tests.checks import Check
from tests.config.flag_effects import BASE, LONGER, STREAMS
from tests.config.flag_table import FLAGS
from tests.runs import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory, pool) -> Bench:
    """A folder with data and checkpoints."""
    bench = Bench(tmp_path_factory.mktemp("flags"), pool)
    bench.make_data()
    stopped = {**BASE, **LONGER, "save_interval": 2, "exit_interval": 4}
    bench.observe(runs.training, {**stopped, "save": "../trained"}, 1)
    bench.observe(runs.training, {**stopped, **STREAMS, "save": "../trained-with-streams"}, 1)
    bench.make_damaged()
    folders = {"load": str(bench.folder / "trained"), "save": str(bench.folder / "published")}
    convert(Options(from_format="megalite", to="hf", **folders))
    return bench


def test_every_flag_and_every_choice_has_an_entry():
    assert set(FLAGS) == set(options())
    for key, option in options().items():
        if option.choices:
            assert {option.default, *(e.value for e in FLAGS[key])} - {None} == set(
                option.choices
            ), key


@pytest.mark.parametrize(
    ("key", "effect"),
    [pytest.param(key, e, id=f"{key}={e.value}") for key, es in FLAGS.items() for e in es],
)
def test_each_flag_does_what_it_is_for(bench, key, effect):
    base = {**BASE, **effect.base}
    before = bench.observe(effect.observe, base, effect.ranks)
    after = bench.observe(effect.observe, {**base, key: effect.value, **effect.also}, effect.ranks)
    for check in effect.checks:
        check(before, after)
    assert any(fails(check, before) for check in effect.checks), (
        "the checks would accept a flag that does nothing"
    )


def fails(check: Check, observation: Any) -> bool:
    """Whether the check notices that nothing changed."""
    try:
        check(observation, observation)
    except (AssertionError, ValueError):
        return True
    return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_nccl_on_a_machine_without_gpus_is_reported_before_the_ranks_meet(bench):
    message = runs.refusal_or_start(
        bench, {**BASE, "device": "auto", "distributed_backend": "nccl"}, 1
    )
    assert "nccl works between GPUs" in message and "--distributed-backend gloo" in message
