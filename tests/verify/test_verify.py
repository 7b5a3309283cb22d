"""tools/verify_layouts.py and its library: correct layouts pass, injected faults are found."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megalite.data.loader import GPTLoader
from megalite.models.gpt import GPT
from megalite.nn import linear
from megalite.parallel.boxes import Box
from megalite.training.build import build_model
from megalite.verify.compare import Comparison, Rounding, compare, report
from megalite.verify.record import ACTIVATION, ACTIVATION_GRADIENT, GRADIENT, LOSS, record
from tests.layouts import GLOBAL_BATCH, LAYOUTS, PACKED, Layout, configuration

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/verify_layouts.py"
RECIPES = sorted(ROOT.glob("examples/quickstart/*.yaml"))
"""Those that fit a machine of 8 ranks; the others, for clusters, are checked in
tests/test_submit.py."""
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


@pytest.fixture(scope="module")
def verify(pool, tmp_path_factory):
    """`verify(layout, function=record, *more, **flags)`: the comparison of a layout with one
    process."""

    @cache
    def one_process(shape, flags: tuple) -> Path:
        folder = tmp_path_factory.mktemp("reference")
        pool.run(record, 1, configuration(Layout("single", shape=shape), **dict(flags)), folder)
        return folder

    def run(layout: Layout, function=record, *more, **flags) -> Comparison:
        folder, config = tmp_path_factory.mktemp("chosen"), configuration(layout, **flags)
        pool.run(function, layout.world_size, config, folder, *more)
        data = {
            key: layout.flags[key]
            for key in ("micro_batch_size", *layout.packing)
            if key in layout.flags
        }
        reference = one_process(layout.shape, tuple((flags | data).items()))
        rounding = Rounding(
            config.model, config.optimizer.precision, GLOBAL_BATCH * config.model.seq_length
        )
        return compare(reference, 1, folder, layout.world_size, rounding)

    return run


SOUND = [
    "dp2 x tp2 x pp2 +sp",
    "uneven pp3",
    "microbatch of 2",
    "a rank of padding only",
    "llama dp2 x tp2 x pp2 +sp",
    "selective",
    "full uniform",
    "full uniform by 2",
    "packed documents tp2+sp",
    "packed llama pp4",
    "bert dp2 x tp2 x pp2 +sp",
    "bert llama tied pp3",
]


@pytest.mark.parametrize(
    "layout, precision",
    [
        *((layout, "fp64") for layout in LAYOUTS if layout.name in SOUND),
        *((layout, "bf16") for layout in LAYOUTS if layout.name.endswith("dp2 x tp2 x pp2 +sp")),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_sound_layouts_have_the_same_numbers(verify, layout, precision):
    found = verify(layout, precision=precision, **DROPOUT)
    assert found.first is None, found.verdict
    assert found.verdict.startswith("same numbers: largest difference ")
    assert found.losses[1] == pytest.approx(
        found.losses[0], rel=1e-14 if precision == "fp64" else 1e-2
    )
    assert "!" not in report(found)


# The faults. Each is a rank's program, or builds its model, and affects that rank's
# process only.


def norm_gradient_is_not_summed(config, context, rng):
    """A norm behind sequence parallelism whose gradient is left partial."""
    model = build_model(config, context, rng)
    for name in {"layers.1.mlp_norm.weight"} & set(model.parameters_by_name):
        weight = model.parameters_by_name[name]
        weight.spec = replace(weight.spec, partial=())
    return model


def bias_has_the_slice_of_rank_0(config, context, rng):
    """Every tensor rank gets the first shard of a bias."""
    model = build_model(config, context, rng)
    for name in {"layers.2.attention.qkv.bias"} & set(model.parameters_by_name):
        bias = model.parameters_by_name[name]
        bias.spec = replace(bias.spec, box=Box((0, 0, 0), bias.spec.box.shape))
    return model


@contextmanager
def patched(owner, name: str, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def build_model_with_tied_copies_apart(config, context, rng):
    """First and last stage do not sum the gradients of their copies of the embedding."""
    model = build_model(config, context, rng)
    for name in {"embedding.word_embeddings.weight"} & set(model.parameters_by_name):
        weight = model.parameters_by_name[name]
        weight.spec = replace(weight.spec, sharded=("tensor", "pipeline"))
    return model


def record_with_tied_copies_apart(launch, config, folder):
    record(launch, config, folder, build_model_with_tied_copies_apart)


def record_with_swapped_microbatches(launch, config, folder):
    """Data rank 1 takes its microbatches 0 and 1 in swapped order."""
    sound = GPTLoader.batch

    def swapped(self, consumed, i):
        return sound(self, consumed, {0: 1, 1: 0}.get(i, i) if self.data_rank == 1 else i)

    with patched(GPTLoader, "batch", swapped):
        record(launch, config, folder)


def record_without_loss_mask(launch, config, folder):
    sound = GPTLoader.batch

    def unmasked(self, consumed, i):
        batch = sound(self, consumed, i)
        return batch | {"loss_mask": np.ones_like(batch["loss_mask"])}

    with patched(GPTLoader, "batch", unmasked):
        record(launch, config, folder)


def record_without_backward_sum(launch, config, folder):
    """The gradient of a column-parallel layer's input is left partial."""
    sound = linear.all_reduce

    def forward_only(tensor, group, op="sum", async_op=False):
        return sound(
            tensor, replace(group, ranks=(group.rank,)) if async_op else group, op, async_op
        )

    with patched(linear, "all_reduce", forward_only):
        record(launch, config, folder)


def record_with_nan(launch, config, folder):
    """A weight of one rank is NaN."""
    record(launch, config, folder, build_model_with_nan if launch.rank == 1 else build_model)


class GPTWithoutSegments(GPT):
    """A stage that does not receive where documents end."""

    @property
    def inputs(self):
        return super().inputs - {"segments"}


def second_stage_sees_other_documents(config, context, rng):
    model = build_model(config, context, rng)
    if context.pipeline.rank == 1:
        for stage in model.stages:
            stage.__class__ = GPTWithoutSegments
    return model


def build_model_with_nan(config, context, rng):
    model = build_model(config, context, rng)
    with torch.no_grad():
        model.parameters_by_name["layers.3.mlp.up.weight"][0, 0] = float("nan")
    return model


UNPADDED = {"make_vocab_size_divisible_by": 1}  # so that every tensor rank holds words that occur
EVERY = Layout(
    "dp2 x tp2 x pp2 +sp", dp=2, tp=2, pp=2, flags={"sequence_parallel": True} | UNPADDED
)
FAULTS = [
    (
        EVERY,
        (record, norm_gradient_is_not_summed),
        GRADIENT,
        "layers.1.mlp_norm.weight",
        range(0, 4),
    ),
    (
        EVERY,
        (record_with_tied_copies_apart,),
        GRADIENT,
        "embedding.word_embeddings.weight",
        range(8),
    ),
    (EVERY, (record, bias_has_the_slice_of_rank_0), ACTIVATION, "layers.2.attention.qkv", [5, 7]),
    (
        Layout("dp2 x pp2", dp=2, pp=2),
        (record_with_swapped_microbatches,),
        ACTIVATION,
        "embedding",
        [1],
    ),
    (Layout("tp2", tp=2), (record_without_loss_mask,), LOSS, "loss", [0, 1]),
    (
        Layout("tp2", tp=2),
        (record_without_backward_sum,),
        ACTIVATION_GRADIENT,
        "final_norm",
        [0, 1],
    ),
    (
        Layout("pp4", pp=4, flags=PACKED),
        (record, second_stage_sees_other_documents),
        ACTIVATION,
        "layers.1.attention",
        [1],
    ),
    (Layout("dp2", dp=2), (record_with_nan,), ACTIVATION, "layers.3.mlp.up", [1]),
]


@pytest.mark.parametrize(
    "layout, program, kind, name, ranks", FAULTS, ids=[fault[1][-1].__name__ for fault in FAULTS]
)
def test_injected_faults_are_located(verify, layout, program, kind, name, ranks):
    found = verify(layout, *program, **DROPOUT)
    assert (found.first.kind, found.first.name) == (kind, name), found.verdict
    assert set(found.first.ranks) == set(ranks)
    assert found.verdict.startswith(f"DIFFERENT: first at {name} ({kind}): difference ")
    assert "!" in report(found)


def test_elements_that_no_rank_computes_are_a_difference(pool, tmp_path):
    """A record of half the ranks: nothing in it is wrong, but samples are missing."""
    for name, layout in (("one", Layout("single")), ("two", Layout("dp2", dp=2))):
        (tmp_path / name).mkdir()
        pool.run(record, layout.world_size, configuration(layout), tmp_path / name)
    rounding = Rounding(configuration(Layout("single")).model, "fp64", 128)
    assert compare(tmp_path / "one", 1, tmp_path / "two", 2, rounding).first is None
    found = compare(tmp_path / "one", 1, tmp_path / "two", 1, rounding)
    assert found.verdict == "DIFFERENT: first at embedding (activation): no rank computes all of it"


def test_order_is_that_of_the_computation(verify):
    order = [(d.kind, d.name) for d in verify(Layout("pp2", pp=2)).differences]
    layer = [
        (ACTIVATION_GRADIENT, "mlp"),
        (GRADIENT, "mlp.down.bias"),
        (GRADIENT, "mlp.down.weight"),
        (ACTIVATION_GRADIENT, "mlp.up"),
        (GRADIENT, "mlp.up.bias"),
        (GRADIENT, "mlp.up.weight"),
        (ACTIVATION_GRADIENT, "mlp_norm"),
        (GRADIENT, "mlp_norm.bias"),
        (GRADIENT, "mlp_norm.weight"),
    ]
    start = order.index((ACTIVATION_GRADIENT, "layers.2.mlp"))
    assert order[start : start + len(layer)] == [(kind, f"layers.2.{name}") for kind, name in layer]
    assert order[:3] == [
        (ACTIVATION, p) for p in ("embedding", "embedding_dropout", "layers.0.attention_norm")
    ]
    assert order.index((LOSS, LOSS)) == 2 + 8 * 4 + 1
    assert order[-1] == (GRADIENT, "embedding.word_embeddings.weight")
    forward = [name for kind, name in order if kind == ACTIVATION]
    assert [name for kind, name in order if kind == ACTIVATION_GRADIENT] == forward[::-1]


def test_tolerance_grows_along_the_computation():
    rounding = Rounding(configuration(Layout("any")).model, "fp64", 128)
    forward = ["embedding", "layers.0.mlp", "layers.3.mlp", "loss"]
    bounds = [rounding.activation(p) for p in forward] + [
        rounding.gradient(p) for p in forward[::-1]
    ]
    assert bounds == sorted(bounds) and bounds[0] > 2**-52 and bounds[-1] < 1e-12


def tool(*arguments, program=TOOL, **variables) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, program, *map(str, arguments)], capture_output=True, text=True, env=env
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_is_verified(recipe):
    """In its own layout with two data replicas, and with dropout, whatever the recipe has."""
    flags = yaml.safe_load(recipe.read_text())
    sizes = (flags.get(f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline"))
    ranks = 2 * prod(sizes)
    done = tool(
        "--config",
        recipe,
        "--shrink",
        "--ranks",
        ranks,
        "--hidden-dropout",
        0.1,
        "--attention-dropout",
        0.1,
    )
    assert done.returncode == 0, done.stderr
    assert f"dp=2 x tp=2 x pp=2 on {ranks} rank(s)" in done.stdout or "quickstart" not in str(
        recipe
    )
    assert done.stdout.splitlines()[-1].startswith("same numbers: largest difference")


def test_the_tool_refuses_with_status_2():
    done = tool(
        "--shrink", "--tp", "2", "--ranks", "3", "--rng-scheme", "megatron", "--vocab-size", "512"
    )
    assert done.returncode == 2 and not done.stdout
    assert (
        "2 problems in the configuration" in done.stderr
        and "--attention-dropout 0 --hidden-dropout 0" in done.stderr
    )


def test_the_tool_ends_with_status_1_where_numbers_differ(tmp_path):
    """Ranks import the main program and so the fault: data rank 1 shifts its samples by one."""
    program = tmp_path / "faulty.py"
    program.write_text(
        "import sys\n"
        "from megalite.programs import verify_layouts\n"
        "from megalite.data.loader import GPTLoader\n"
        "sound = GPTLoader.batch\n"
        "def shifted(self, consumed, i):\n"
        "    return sound(self, consumed + self.data_rank, i)\n"
        "GPTLoader.batch = shifted\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(verify_layouts.main())\n"
    )
    done = tool("--shrink", "--ranks", 2, "--vocab-size", 512, program=program)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1].startswith(
        "DIFFERENT: first at embedding (activation): difference"
    )
    assert done.stdout.splitlines()[-1].endswith("; rank 1")


def test_the_tool_under_a_launcher(tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    flags = ["--shrink", "--tp", "2", "--vocab-size", "512", "--work-folder", str(tmp_path)]
    common = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, TOOL, *flags],
            env=common | {"RANK": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    printed = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert (
        printed[1] == ""
        and "\nsame numbers" in printed[0]
        and "tp=2 x pp=1 on 2 rank(s)" in printed[0]
    )
