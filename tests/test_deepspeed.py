"""DeepSpeed's ZeRO under our model and loop: the same numbers as our own optimizer, checkpoints
that either resumes, and the rest of a run.

Each world size has a pool of its own: DeepSpeed counts modules for the life of a process and
compares the counts between ranks.
"""

import io
import json
import logging
import os
import signal
import subprocess
from contextlib import closing, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megalite.config import cli, validate
from megalite.config.run import RunConfig
from megalite.parallel.context import DeviceError
from megalite.training.build import build_components, build_model
from megalite.training.load_model import load_model
from megalite.training.pretrain import pretrain
from megalite.verify.compare import LOSS, Rounding
from megalite.watch.agreement import RanksDiffer
from megalite.watch.watchdog import HUNG
from tests.layouts import GPT2, QWEN3, Layout, as_bert, configuration, sp
from tests.pool import RankPool, RanksFailed
from tests.test_readme import environment
from tests.test_resume import curve
from tests.tiny import ONE_PROCESS as ALONE
from tests.tiny import Tiny, build
from tests.trouble import troubled

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="needs DeepSpeed: pip install 'megalite[deepspeed]' (make install does)",
)
ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
CPU = {"offload_optimizer": {"device": "cpu"}}
PARTS = {"stage3_param_persistence_threshold": 0}
"""Small weights are divided too."""
SMALL_BUCKETS = {"reduce_bucket_size": 3000, "allgather_bucket_size": 3000, "overlap_comm": True}


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request):
    """(pool of its own, its number of ranks)."""
    with closing(RankPool(max_ranks=request.param)) as pool:
        yield pool, request.param


@pytest.fixture(scope="module")
def two():
    with closing(RankPool(max_ranks=2)) as pool:
        yield pool


def written(folder: Path, stage: int, **zero) -> dict:
    """The flags of a ds.json of this stage, which is written."""
    path = folder / f"ds-{stage}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **zero}}))
    return {"deepspeed": True, "deepspeed_config": str(path)}


# The same numbers -------------------------------------------------------------------------------


def curves(launch, layout: Layout, flags: dict, ways: list[dict], steps: int = STEPS) -> list:
    """[(loss, gradient norm), ...] of the first steps by each way of training."""
    found = []
    first = None
    for way in ways:
        tiny = built_again(layout, launch, first, **(flags | way))
        first = first or tiny
        found.append([step(tiny, number) for number in range(1, steps + 1)])
    return found


def built_again(layout: Layout, launch, first: Tiny | None, **flags) -> Tiny:
    """As `build`, in the groups of an earlier one."""
    if first is None:
        return build(layout, launch, **flags)
    config = configuration(layout, **flags)
    return replace(first, config=config, components=build_components(config, first.context))


def step(tiny: Tiny, number: int) -> tuple[float, float]:
    loss = tiny.gradient((number - 1) * tiny.config.data.global_batch_size)
    return loss.sum().item(), tiny.components.optimizer.step(number).gradient_norm


def global_losses(of_ranks: list, layout: Layout, way: int) -> torch.Tensor:
    """Loss of each step over the whole batch: data ranks hold parts of it."""
    firsts = of_ranks[:: layout.tp]
    return torch.tensor([[loss for loss, _ in found[way]] for found in firsts]).sum(0)


def tolerances(config: RunConfig) -> tuple[float, torch.Tensor]:
    """(relative, of the first gradient norm; absolute, of the loss of each step).

    The forward rounds the loss by at most `activation`, relative. The gradients of two correct
    computations differ by `gradient`, relative to the largest entry G. AdamW turns an entry's
    relative error into one of its update of the same size (both moments scale with it), so an
    entry g of weight w makes an error of lr * gradient * G / |g| in w, which changes the loss by
    |g| times that. Errors of n entries and k steps are independent: sqrt(n k) lr gradient G.
    Clipping bounds G by clip_grad.
    """
    tokens = config.data.global_batch_size * config.model.seq_length
    rounding = Rounding(config.model, "fp32", tokens)
    o = config.optimizer
    entries = 40_000  # at most: two layers of hidden size 32, 257 rows of the vocabulary
    gradient = rounding.gradient("embedding.word_embeddings.weight")
    drift = torch.arange(STEPS).mul(entries).sqrt() * o.lr * gradient * o.clip_grad
    return gradient, 6.0 * rounding.activation(LOSS) + drift


TIED = replace(GPT2, layers=2)
UNTIED = replace(QWEN3, layers=2)
FULL = {"recompute_granularity": "full"}
LAYOUTS = {
    1: [(Layout("single", shape=TIED), [(3, {**PARTS, **CPU})])],
    2: [
        (
            Layout("dp2", dp=2, shape=TIED),
            [(1, {"overlap_comm": True, **SMALL_BUCKETS}), (2, CPU), (3, {})],
        ),
        (Layout("llama dp2", dp=2, shape=UNTIED, flags=FULL), [(3, PARTS)]),
    ],
    4: [
        (
            Layout("dp2 x tp2 +sp", tp=2, dp=2, shape=TIED, flags=sp()),
            [(1, {}), (2, SMALL_BUCKETS), (3, PARTS)],
        ),
        (Layout("bert dp2 x tp2", tp=2, dp=2, shape=as_bert(UNTIED), flags=FULL), [(2, {})]),
    ],
}
"""By number of ranks: layouts, and the stages of ZeRO with more of that section."""


def test_losses_are_those_of_our_own_optimizer(ranks, tmp_path):
    pool, size = ranks
    for layout, stages in LAYOUTS[size]:
        flags = {"precision": "fp32", "micro_batch_size": 2, "train_iters": STEPS}
        ways = [written(tmp_path, stage, **section) for stage, section in stages]
        # Ours last: the groups are those that DeepSpeed needs.
        of_ranks = pool.run(curves, size, layout, flags, [*ways, {}], timeout=200)
        norm_tolerance, loss_tolerance = tolerances(configuration(layout, **flags))
        ours = global_losses(of_ranks, layout, -1)
        for way in range(len(ways)):
            theirs = global_losses(of_ranks, layout, way)
            assert ((theirs - ours).abs() <= loss_tolerance).all(), (layout.name, ways[way])
            for found in of_ranks:
                assert found[way][0][1] == pytest.approx(found[-1][0][1], rel=norm_tolerance)


DP2 = Layout("dp2", dp=2, shape=TIED)


def test_bf16_is_as_near_to_fp32_as_our_own_is(two, tmp_path):
    """Each rounds weights and activations as the other does, but sums gradients elsewhere: so they
    are as far from fp32 as ours, within twice our largest distance."""
    ways = [written(tmp_path, 1), written(tmp_path, 2, **CPU), written(tmp_path, 3, **PARTS)]
    flags = {"precision": "bf16", "micro_batch_size": 2, "train_iters": STEPS}
    both = [*ways, {}, {"precision": "fp32"}]
    of_ranks = two.run(curves, 2, DP2, flags, both, 8, timeout=150)
    *theirs, ours, exact = [global_losses(of_ranks, DP2, way) for way in range(len(both))]
    distance = (ours - exact).abs().max()
    for losses in theirs:
        assert 0 < (losses - exact).abs().max() < 2 * distance


def fp16_steps(launch, way: dict) -> list[tuple]:
    """What each of 8 steps says in fp16, which DeepSpeed can compute on a CPU, but refuses to."""
    flags = {"micro_batch_size": 2, "train_iters": 8}
    tiny = build(DP2, launch, precision="fp32", **flags, **way)
    scaled = {"precision": "fp16", "initial_loss_scale": 2.0**24, "loss_scale_window": 3}
    config = configuration(DP2, **flags, **scaled, hysteresis=1, **way)
    if way:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    tiny = replace(tiny, config=config, components=build_components(config, tiny.context))
    found = []
    for number in range(1, 9):
        loss, _ = step(tiny, number)
        scale = tiny.components.optimizer.loss_scale
        found.append((loss, scale.overflows, scale.value))
    return found


def test_fp16_has_our_loss_scale(two, tmp_path):
    """The scale falls from where gradients overflow, and rises again, in the same steps as ours."""
    ours = two.run(fp16_steps, 2, {})
    rounding = Rounding(configuration(DP2).model, "fp16", 0).activation(LOSS)
    for stage in (2, 3):
        theirs = two.run(fp16_steps, 2, written(tmp_path, stage))
        for mine, other in zip(ours, theirs):
            assert [after for _, *after in other] == [after for _, *after in mine]
            assert [loss for loss, *_ in other] == pytest.approx(
                [loss for loss, *_ in mine], rel=rounding
            )
    assert 0 < ours[0][-1][1] < 8


# A run ------------------------------------------------------------------------------------------

MODEL = """
    --mock-data --vocab-size 61 --num-layers 2 --hidden-size 16 --num-attention-heads 4
    --seq-length 16 --micro-batch-size 1 --global-batch-size 4 --train-iters 6 --lr 1e-2
    --hidden-dropout 0.1 --eval-interval 2 --eval-iters 1 --device cpu
""".split()


def trained(launch, flags: list[str], stop_in: int | None = None) -> str:
    """What pretrain_gpt.py does on a rank; what it printed. SIGUSR1 comes in step `stop_in`."""

    def build_signalled(config, context, rng):
        def hook(*unused):
            if context.activity.step == stop_in and context.rank == 0 and model.training:
                signal.raise_signal(signal.SIGUSR1)

        model = build_model(config, context, rng)
        model.stages[0].register_forward_pre_hook(hook)
        return model

    config = cli.read_config([*MODEL, *flags])
    assert validate.check(config, launch.world_size) == []
    with redirect_stdout(io.StringIO()) as printed:
        pretrain(validate.resolve(config, launch.world_size), launch, build_signalled)
    return printed.getvalue()


def used(folder: Path, stage: int, **zero) -> list[str]:
    """The flags of `written`."""
    return ["--deepspeed", "--deepspeed-config", written(folder, stage, **zero)["deepspeed_config"]]


RESUMED = {
    "1 in bf16": (1, {}, ["--bf16"]),
    "2, offloaded, by SGD": (2, CPU, ["--optimizer", "sgd"]),
    "3": (3, PARTS, []),
    "3 in bf16, small weights whole": (3, {"sub_group_size": 5000}, ["--bf16"]),
}


@pytest.mark.parametrize("way", RESUMED)
def test_a_run_that_a_signal_stops_resumes_to_the_bit(two, tmp_path, way):
    stage, section, flags = RESUMED[way]
    flags = [*flags, *used(tmp_path, stage, **section)]
    whole = tmp_path / "whole.jsonl"
    two.run(trained, 2, [*flags, "--metrics-file", str(whole)])
    parts = tmp_path / "parts.jsonl"
    kept = ["--save", str(tmp_path / "c"), "--load", str(tmp_path / "c")]
    kept += ["--save-interval", "2", "--async-save"]
    flags += [*kept, "--metrics-file", str(parts)]
    said = two.run(trained, 2, flags, 3)[0]
    assert "stopped at iteration 3: SIGUSR1" in said and f"ZeRO stage {stage}" in said
    said = two.run(trained, 2, flags)[0]
    assert "resumed from" in said and "at iteration 3" in said
    assert curve(parts) == curve(whole)
    names = {key for line in curve(whole) for key in line}
    assert {"loss", "grad_norm", "learning_rate", "validation_loss"} <= names


def test_any_run_continues_any_other(two, tmp_path):
    """Stage 3 on two data ranks, then our own optimizer on two tensor ranks, then stage 1 on two
    data ranks: the losses are those of one run of our own, to rounding."""
    ours = tmp_path / "ours.jsonl"
    # Batches of 2, then 4: DeepSpeed counts no microbatches.
    ramp = ["--rampup-batch-size", "2", "2", "6"]
    two.run(trained, 2, [*ramp, "--metrics-file", str(ours)])
    chain = tmp_path / "chain.jsonl"
    kept = ["--save", str(tmp_path / "c"), "--load", str(tmp_path / "c")]
    kept += [*ramp, "--metrics-file", str(chain)]
    for stop, flags in (
        (2, [*used(tmp_path, 3, **PARTS), "--check-replicas", "1", "--tp", "2", "--sp"]),
        (4, ["--tp", "2"]),
        (6, [*used(tmp_path, 1), "--check-replicas", "2"]),
    ):
        two.run(trained, 2, [*kept, *flags, "--exit-interval", str(stop)])
    for mine, other in zip(curve(ours), curve(chain), strict=True):
        for key in ("loss", "validation_loss", "grad_norm"):
            if key in mine:
                # The bound of `tolerances`, relative, after at most 6 steps.
                assert other[key] == pytest.approx(mine[key], rel=2e-4)
    loaded = load_model(tmp_path / "c", "gpt", step=2, device="cpu", tokenizer_type="NullTokenizer")
    assert loaded.iteration == 2


def test_a_gradient_that_is_not_finite_changes_no_weight(two, tmp_path):
    for stage, precision in ((1, "bf16"), (2, "fp32"), (3, "fp32")):
        way = written(tmp_path, stage) | {"precision": precision}
        assert two.run(poisoned, 2, way) == [(True, 1, 1, "the gradient norm is nan")] * 2


def test_warnings_of_what_the_log_reports_are_not_shown(two, tmp_path):
    way = written(tmp_path, 2) | {"optimizer": "lion", "precision": "fp32"}
    shown = two.run(warnings_shown, 2, way)
    assert shown == [["something else"]] * 2


def warnings_shown(launch, way: dict) -> list[str]:
    """What DeepSpeed warns of from the making of an optimizer on, and after a bad step of it."""
    from deepspeed.utils import logger

    shown = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(handler)
    try:
        poisoned(launch, way)
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    return shown


def poisoned(launch, way: dict) -> tuple:
    """After a step, and one with a gradient of NaN on one rank: whether the weights are those of
    the first, updates, bad steps, and why the second is bad."""
    tiny = build(DP2, launch, micro_batch_size=4, **way)
    step(tiny, 1)
    optimizer = tiny.components.optimizer
    before = {name: master.clone() for name, master in optimizer.master.items()}
    if launch.rank == 1:
        tiny.components.engine.loss_scale = lambda: float("nan")
    result = tiny.train(2)
    assert result.skipped and result.gradient_norm != result.gradient_norm
    equal = all(torch.equal(before[name], optimizer.master[name]) for name in before)
    return equal, optimizer.steps, optimizer.bad_steps.total, result.bad


def differing(launch, folder: Path) -> str:
    """Why ranks whose ds.json differs do not start."""
    before = Path.cwd()
    os.chdir(folder / str(launch.rank))
    try:
        build(DP2, launch, deepspeed=True, deepspeed_config="ds.json")
    except RanksDiffer as error:
        return str(error)
    finally:
        os.chdir(before)
    return "built"


def test_each_setting_that_ranks_have_otherwise_is_named(two, tmp_path):
    for rank, stage in enumerate((3, 2)):
        (tmp_path / str(rank)).mkdir()
        text = json.dumps({"zero_optimization": {"stage": stage, "sub_group_size": 5000}})
        (tmp_path / str(rank) / "ds.json").write_text(text)
    first, second = two.run(differing, 2, tmp_path)
    assert first.endswith(": ds.json zero_optimization.stage 2 (rank 0: 3)") and not second


def test_fp16_needs_a_gpu(tmp_path):
    flags = written(tmp_path, 2) | {"precision": "fp16", "device": "auto"}
    with pytest.raises(DeviceError, match="works on GPUs only: 0 GPU"):
        build(DP2, replace(ALONE, world_size=2), **flags)


def hanging(launch, flags: list[str]) -> None:
    config = validate.resolve(cli.read_config([*MODEL, *flags]), launch.world_size)
    pretrain(config, launch, troubled("sleep 1 2"))


def test_a_hang_is_explained(two, tmp_path):
    """Rank 0 waits in a call of DeepSpeed's, which the watchdog does not see; the stacks tell."""
    flags = [*used(tmp_path, 2), "--save", str(tmp_path / "c"), "--hang-timeout", "3"]
    with pytest.raises(RanksFailed) as failed:
        two.run(hanging, 2, flags)
    said = str(failed.value)
    assert said.count(f"exited with status {HUNG}\n") >= 1 and "HANG: no progress" in said
    text = (tmp_path / "c" / "hang-step-2.txt").read_text()
    assert "/deepspeed/" in text and "in sleep" in text, text


def test_the_example_runs(tmp_path):
    """And goes on without DeepSpeed, from one rank's share of every weight to the whole."""
    script = (ROOT / "examples/deepspeed/train.sh").read_text()
    assert "examples/deepspeed/train.sh" in (ROOT / "docs/deepspeed.md").read_text()
    # torchrun may be that of another environment.
    script = script.replace("\ntorchrun ", "\npython -m torch.distributed.run ")
    copy = tmp_path / "examples/deepspeed"
    copy.mkdir(parents=True)
    (copy / "train.sh").write_text(script)
    (copy / "ds.json").write_text((ROOT / "examples/deepspeed/ds.json").read_text())
    (tmp_path / "pretrain_gpt.py").symlink_to(ROOT / "pretrain_gpt.py")
    done = subprocess.run(
        ["bash", "examples/deepspeed/train.sh"],
        cwd=tmp_path,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = done.stdout
    assert done.returncode == 0, said[-4000:]
    assert "ZeRO stage 3, as examples/deepspeed/ds.json says; optimizer on the CPU" in said
    assert "resumed from" in said and "is deprecated" not in said
    assert "its settings" in said and '"stage": 3' in said
    assert (tmp_path / "runs/deepspeed/checkpoints/ds.json").exists()
    losses = [
        line["loss"] for line in curve(tmp_path / "runs/deepspeed/metrics.jsonl") if "loss" in line
    ]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.1
