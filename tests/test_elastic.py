"""Any layout goes on from any other's checkpoint, and back: pairs of layouts, drawn at random."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.load import Checkpoint
from megalite.config import cli, validate
from megalite.training.build import build_components, build_context
from megalite.training.resume import resume
from megalite.training.state import save_state
from tests.test_resume import MODEL, curve, train

SEED = 16
SIZES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
EIGHT_RANKS = [(2, 2, 2), (1, 4, 2), (4, 1, 2), (1, 2, 4), (2, 4, 1), (8, 1, 1)]
"""(dp, tp, pp)."""
FLAGS = ["--train-iters", "9", "--eval-interval", "0", "--eval-iters", "0"]
STOPS = ["--exit-interval", "3"]


def draw_layout(generator: random.Random, sizes: list) -> tuple[int, list[str]]:
    """(ranks, flags) of a layout: sizes of its axes, sequence parallelism, ZeRO-1, overlap,
    schedule."""
    dp, tp, pp = generator.choice(sizes)
    flags = ["--tp", str(tp), "--pp", str(pp)]
    if tp > 1 and generator.random() < 0.5:
        flags += ["--sp"]
    if pp > 1:
        # The model has 4 layers: two stages on a rank with 2 ranks of a pipeline only.
        names = ["1f1b", "gpipe", "zb-h1", *(["interleaved", "zb-v"] if pp == 2 else [])]
        flags += ["--pipeline-schedule", generator.choice(names)]
    if generator.random() < 0.6:
        flags += ["--use-distributed-optimizer", "--ddp-bucket-size", "3000"]
        flags += generator.choice([[], ["--overlap-param-gather"]])
    if generator.random() < 0.5:
        flags += ["--overlap-grad-reduce"]
    return dp * tp * pp, flags


Pair = tuple[tuple[int, list[str]], tuple[int, list[str]]]


def draw_pair(generator: random.Random, sizes: list) -> Pair:
    """Two layouts."""
    return draw_layout(generator, sizes), draw_layout(generator, sizes)


def draw_pair_and_precisions(generator: random.Random, sizes: list) -> tuple:
    """Two layouts, and a precision for each."""
    precisions = [generator.choice(["fp64", "fp32", "bf16", "fp16"]) for _ in range(2)]
    return *draw_pair(generator, sizes), *precisions


def quick_and_slow(draw: Callable, quick: int, slow: int, seed: int) -> list:
    """What `draw` gives: of up to 4 ranks for every run of the tests, and more, of up to 8, for
    `slow`."""
    generator = random.Random(seed)
    drawn = [pytest.param(*draw(generator, SIZES)) for _ in range(quick)]
    for _ in range(slow):
        values = draw(generator, SIZES + 2 * EIGHT_RANKS)
        drawn.append(pytest.param(*values, marks=pytest.mark.slow))
    return drawn


def describe(value: object) -> str | None:
    """The name of a layout in the name of a test."""
    if isinstance(value, tuple):
        ranks, flags = value
        return f"{ranks}: {' '.join(flags).replace('--', '')}"
    return None


@pytest.fixture(scope="module")
def undisturbed(pool, tmp_path_factory) -> list[dict]:
    """Metrics of one process in fp64 that nobody stops."""
    path = tmp_path_factory.mktemp("undisturbed") / "metrics.jsonl"
    train(pool, 1, *FLAGS, "--precision", "fp64", "--metrics-file", path)
    return curve(path)


BY_HAND = (3, ["--pp", "3", "--pipeline-split", "1,1,2"])
WITH_GIVEN_END = (2, ["--pp", "2", "--decoder-first-pipeline-num-layers", "3"])


@pytest.mark.parametrize(
    ("one", "other"),
    [(BY_HAND, WITH_GIVEN_END), *quick_and_slow(draw_pair, 3, 12, SEED)],
    ids=describe,
)
def test_losses_go_on_there_and_back(pool, tmp_path, undisturbed, one, other):
    """Three steps in one layout, three in the other, three in the first again: losses, norms and
    learning rates of one process in fp64."""
    folder = ["--save", tmp_path / "c", "--load", tmp_path / "c"]
    flags = [*FLAGS, "--precision", "fp64", *folder, "--metrics-file", tmp_path / "m.jsonl"]
    for ranks, layout in (one, other, one):
        train(pool, ranks, *layout, *flags, *STOPS)
    for entry, wanted in zip(curve(tmp_path / "m.jsonl"), undisturbed, strict=True):
        assert entry == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("one", "other"), quick_and_slow(draw_pair, 1, 4, SEED + 1), ids=describe)
def test_the_same_layout_goes_on_bit_exactly(pool, tmp_path, one, other):
    """Either layout of a pair, with dropout."""
    for number, (ranks, layout) in enumerate((one, other)):
        flags = [*FLAGS, *layout, "--metrics-file"]
        train(pool, ranks, *flags, tmp_path / f"whole{number}.jsonl")
        parts = tmp_path / f"parts{number}.jsonl"
        folder = ["--save", tmp_path / str(number), "--load", tmp_path / str(number)]
        train(pool, ranks, *flags, parts, *folder, "--exit-interval", "5")
        train(pool, ranks, *flags, parts, *folder)
        assert curve(parts) == curve(tmp_path / f"whole{number}.jsonl")


def copy_checkpoint(launch, flags: list[str]) -> None:
    """Load a checkpoint into model and optimizer, and save them, with no step in between."""
    config = validate.resolve(cli.read_config([*MODEL, *flags]), launch.world_size)
    context, _ = build_context(config, launch)
    components = build_components(config, context)
    save_state(components, resume(components, config), config)


def through(tensor: torch.Tensor, precision: str) -> torch.Tensor:
    """What is left of a stored tensor after a run in another precision, which keeps weights and
    moments in fp32 at least."""
    if tensor.dtype == torch.float64 and precision != "fp64":
        return tensor.float().double()
    return tensor


BETWEEN_HALVES = ((1, []), (2, ["--pp", "2"]), "bf16", "fp16")
"""fp16 does not hold small numbers of bf16: the master weights do."""


@pytest.mark.parametrize(
    ("one", "other", "precision", "other_precision"),
    [
        BETWEEN_HALVES,
        (BY_HAND, WITH_GIVEN_END, "bf16", "fp32"),
        *quick_and_slow(draw_pair_and_precisions, 4, 12, SEED + 2),
    ],
    ids=describe,
)
def test_the_state_comes_back_bit_for_bit(pool, tmp_path, one, other, precision, other_precision):
    """Weights, master weights and moments, through a checkpoint of another layout and precision:
    nothing is lost but what fp64 has more than fp32."""
    ranks, layout = one
    ranks_there, layout_there = other
    flags = [*FLAGS, *layout, "--precision", precision]
    train(pool, ranks, *flags, "--save", tmp_path / "before", "--exit-interval", "3")
    there = [*FLAGS, *layout_there, "--precision", other_precision]
    there += ["--load", tmp_path / "before", "--save", tmp_path / "there"]
    back = [*flags, "--load", tmp_path / "there", "--save", tmp_path / "back"]
    pool.run(copy_checkpoint, ranks_there, list(map(str, there)))
    pool.run(copy_checkpoint, ranks, list(map(str, back)))
    require_equal(tmp_path / "before", tmp_path / "back", other_precision)


def require_equal(before: Path, after: Path, precision_between: str) -> None:
    with Checkpoint.open(before) as first, Checkpoint.open(after) as last:
        assert first.names == last.names
        assert any(name.startswith("optimizer.exp_avg_sq.") for name in first.names)
        for name in first.names:
            wanted = through(first.read(name), precision_between)
            found = last.read(name)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted), name
        for key in ("iteration", "consumed_samples", "optimizer_steps"):
            assert first.state[key] == last.state[key]
