"""Stopping and resuming: bit-exact in the same layout, to rounding in another one."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from megalite.config import cli, validate
from megalite.data.blend import Blend
from megalite.preprocess.indexed_writer import IndexedWriter
from megalite.training.build import build_model
from megalite.training.pretrain import pretrain
from tests.pool import RanksFailed

ROOT = Path(__file__).resolve().parents[1]
MODEL = """
    --mock-data --vocab-size 131 --num-layers 4 --hidden-size 32
    --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 --global-batch-size 8
    --train-iters 12 --lr 1e-2 --lr-warmup-iters 3 --eval-interval 4 --eval-iters 1 --device cpu
""".split()
EIGHT_RANKS = "--tp 2 --pp 2 --sp".split()
SHARDED = """
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 3000
""".split()

MUON = ["--optimizer", "muon", "--parameter-groups", "layers.0.* freeze", "*.bias lr_factor=0.5"]
FP16 = "--fp16 --initial-loss-scale 1e9 --loss-scale-window 2".split()
"""The scale falls at first, and rises again."""
RAMP = "--rampup-batch-size 4 2 40".split()
"""Batches of 4 for 5 iterations, then of 6 for 4, then of 8."""


def pretrain_on_rank(launch, flags: list[str]) -> str:
    """What pretrain_gpt.py does, on a rank of the pool; what it printed."""
    config = cli.read_config([*MODEL, *flags])
    assert validate.check(config, launch.world_size) == []
    with redirect_stdout(io.StringIO()) as printed:
        pretrain(validate.resolve(config, launch.world_size), launch)
    return printed.getvalue()


def train(pool, ranks: int, *flags) -> str:
    """Run to the end on this many ranks; what rank 0 printed."""
    return pool.run(pretrain_on_rank, ranks, list(map(str, flags)), timeout=120)[0]


def start(*flags) -> subprocess.Popen:
    """pretrain_gpt.py as a process of its own, to be stopped."""
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *MODEL, *map(str, flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def curve(*paths: Path) -> list[dict]:
    """What must not change: everything but times. Of an iteration that was run twice, the later
    line."""
    found = {}
    for path in paths:
        for line in path.read_text().splitlines():
            entry = {key: value for key, value in json.loads(line).items() if "second" not in key}
            found[entry["iteration"], "loss" in entry] = entry
    return [found[key] for key in sorted(found)]


@pytest.fixture(scope="module")
def undisturbed(pool, tmp_path_factory) -> Path:
    """Metrics of a run of one process with dropout that nobody stops."""
    path = tmp_path_factory.mktemp("undisturbed") / "metrics.jsonl"
    train(pool, 1, "--metrics-file", path)
    return path


def resumable(folder: Path) -> list:
    """The flags of a run that resumes where it stopped."""
    return ["--save", folder / "c", "--load", folder / "c", "--metrics-file", folder / "m.jsonl"]


def test_exit_interval_and_resume_bit_exactly(pool, tmp_path, undisturbed):
    train(pool, 1, *resumable(tmp_path), "--exit-interval", "5")
    assert [path.name for path in (tmp_path / "c").glob("iter_*")] == ["iter_0000005"]
    train(pool, 1, *resumable(tmp_path))
    assert (tmp_path / "m.jsonl").read_text().count('"loss"') == 12
    assert curve(tmp_path / "m.jsonl") == curve(undisturbed)


@pytest.mark.parametrize(
    "which", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=lambda s: s.name
)
def test_a_signal_saves_and_the_run_resumes_bit_exactly(pool, tmp_path, undisturbed, which):
    run = start(*resumable(tmp_path))
    wait_for(
        lambda: (
            (tmp_path / "m.jsonl").exists() and (tmp_path / "m.jsonl").read_text().count("\n") >= 2
        )
    )
    run.send_signal(which)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and f": {which.name}" in output
    assert len(list((tmp_path / "c").glob("iter_*"))) == 1
    train(pool, 1, *resumable(tmp_path))
    # An evaluation that the signal interrupted was given up.
    steps, wanted = (
        [line for line in curve(path) if "loss" in line]
        for path in (tmp_path / "m.jsonl", undisturbed)
    )
    assert steps == wanted


def signal_when_caught(which: signal.Signals, former, sent: Path) -> None:
    """Wait until this process catches the signal, as it does before it meets the others; send it,
    and say so in a file."""
    while signal.getsignal(which) == former:
        time.sleep(0.01)
    os.kill(os.getpid(), which)
    sent.touch()


def signalled_early(
    launch, flags: list[str], which: signal.Signals, meeting: bool, sent: Path
) -> str:
    """A training whose rank 1 gets a signal while it waits to meet rank 0, which only starts then,
    or else while it builds its model."""

    def building(*arguments):
        if launch.rank == 1 and not meeting:
            signal.raise_signal(which)
        return build_model(*arguments)

    if meeting and launch.rank == 1:
        arguments = (which, signal.getsignal(which), sent)
        threading.Thread(target=signal_when_caught, args=arguments, daemon=True).start()
    if meeting and launch.rank == 0:
        while not sent.exists():
            time.sleep(0.01)
    with redirect_stdout(io.StringIO()) as printed:
        config = cli.read_config([*MODEL, *flags])
        pretrain(validate.resolve(config, launch.world_size), launch, building)
    return printed.getvalue()


@pytest.mark.parametrize(
    ("which", "meeting"),
    [(signal.SIGUSR1, True), (signal.SIGUSR1, False), (signal.SIGTERM, False)],
    ids=str,
)
def test_a_signal_before_the_first_step_ends_the_run_in_good_order(
    pool, tmp_path, undisturbed, which, meeting
):
    flags = list(map(str, resumable(tmp_path)))
    said = pool.run(signalled_early, 2, flags, which, meeting, tmp_path / "sent")[0]
    assert (
        f"stopped at iteration 0: {which.name} before the first step\n" in said
        and "training from" not in said
    )
    assert (tmp_path / "c/to-be-continued").exists() == (which == signal.SIGUSR1)
    train(pool, 1, *flags)
    assert curve(tmp_path / "m.jsonl") == curve(undisturbed)


def test_a_signal_in_an_evaluation_saves_at_once(tmp_path):
    run = start(*resumable(tmp_path), "--eval-interval", "2", "--eval-iters", "1000000")
    wait_for(
        lambda: (
            (tmp_path / "m.jsonl").exists() and (tmp_path / "m.jsonl").read_text().count("\n") >= 2
        )
    )
    time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=20)
    assert run.returncode == 0 and "stopped at iteration 2: SIGTERM" in output
    assert [path.name for path in (tmp_path / "c").glob("iter_*")] == ["iter_0000002"]


def test_killed_runs_lose_nothing_that_was_saved(pool, tmp_path, undisturbed):
    """SIGKILL at moments that may lie inside a save: the next run starts from a complete checkpoint
    and gives the same numbers."""
    flags, attempts = (
        resumable(tmp_path)[:4],
        [tmp_path / f"{attempt}.jsonl" for attempt in range(3)],
    )
    for attempt, metrics in enumerate(attempts):
        kill_after_first_line(
            [*flags, "--save-interval", "1", "--metrics-file", metrics], metrics, 0.004 * attempt
        )
    train(pool, 1, *flags, "--metrics-file", tmp_path / "last.jsonl")
    assert curve(*attempts, tmp_path / "last.jsonl") == curve(undisturbed)


def kill_after_first_line(flags: list, metrics: Path, delay: float) -> None:
    """Start a run and kill it `delay` seconds after it has reported an iteration."""
    run = start(*flags)
    wait_for(lambda: (metrics.exists() and metrics.stat().st_size > 0) or run.poll() is not None)
    time.sleep(delay)
    run.kill()
    run.communicate()


def test_eight_ranks_stop_and_resume_bit_exactly(pool, tmp_path):
    """dp=2 x tp=2 x pp=2 with sequence parallelism, recompute and dropout in bf16: undisturbed, and
    stopped in the middle."""
    layout = [*EIGHT_RANKS, "--recompute-granularity", "selective", "--bf16"]
    layout += ["--rng-scheme", "megatron"]
    train(pool, 8, *layout, "--metrics-file", tmp_path / "whole.jsonl")
    train(pool, 8, *layout, *resumable(tmp_path), "--exit-interval", "7")
    train(pool, 8, *layout, *resumable(tmp_path))
    assert curve(tmp_path / "m.jsonl") == curve(tmp_path / "whole.jsonl")


@pytest.mark.parametrize("rule", [[], MUON], ids=["adam", "muon"])
def test_resuming_in_another_layout_continues_the_same_curve(pool, tmp_path, rule):
    """Weights, optimizer and data position are read into any layout, and dropout drops the same: 8
    ranks, one process and pp=2 make one run."""
    exact = ["--precision", "fp64", *RAMP, *rule]
    train(pool, 1, *exact, "--metrics-file", tmp_path / "whole.jsonl")
    train(pool, 8, *EIGHT_RANKS, *SHARDED, *exact, *resumable(tmp_path), "--exit-interval", "4")
    said = train(pool, 1, *exact, *resumable(tmp_path), "--exit-interval", "8")
    train(pool, 2, "--pp", "2", *exact, *resumable(tmp_path), "--exit-interval", "10")
    train(pool, 4, "--pp", "2", *SHARDED, *exact, *resumable(tmp_path))
    for one, other in zip(
        curve(tmp_path / "whole.jsonl"), curve(tmp_path / "m.jsonl"), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-9)
    assert "at iteration 4" in said and "drop" not in said.partition("resumed from")[2]


def test_one_checkpoints_folder_is_resumed(pool, tmp_path, undisturbed):
    """--load SAVE/iter_N is --load SAVE --ckpt-step N; another --ckpt-step is refused."""
    folder = tmp_path / "c"
    train(pool, 1, "--save", folder, "--save-interval", "3", "--exit-interval", "9")
    load = ["--load", folder / "iter_0000006", "--metrics-file", tmp_path / "m.jsonl"]
    said = train(pool, 1, *load)
    assert f"resumed from {folder}/iter_0000006 at iteration 6" in said
    wanted = [line for line in curve(undisturbed) if line["iteration"] > 6]
    assert curve(tmp_path / "m.jsonl") == wanted
    config = cli.read_config([*MODEL, *map(str, load), "--ckpt-step", "3"])
    (problem,) = validate.check(config, 1)
    assert "--ckpt-step 3" in problem.message and "holds iterations 6" in problem.message


def test_a_change_of_masks_is_said(pool, tmp_path):
    """Streams that cannot continue, since the layout or the scheme has changed."""
    streams = ["--rng-scheme", "megatron"]
    train(pool, 1, *streams, *resumable(tmp_path), "--exit-interval", "2")
    said = train(pool, 2, "--pp", "2", *streams, *resumable(tmp_path), "--exit-interval", "4")
    assert "dropout's random streams start from the seed" in said
    said = train(pool, 2, "--pp", "2", *resumable(tmp_path), "--exit-interval", "6")
    assert "made with --rng-scheme megatron, this run has global" in said
    said = train(pool, 2, "--pp", "2", *streams, *resumable(tmp_path), "--exit-interval", "8")
    assert "made with --rng-scheme global, this run has megatron" in said


def test_what_is_left_out_of_a_checkpoint(pool, tmp_path):
    """Optimizer and random state: the next run's error names the flag that resumes without them."""
    streams = ["--rng-scheme", "megatron", "--eval-interval", "0", "--eval-iters", "0"]
    flags = [*streams, *resumable(tmp_path), "--train-iters", "4"]
    left_out = ["--no-save-optim", "--no-save-rng", "--exit-interval", "1"]
    train(pool, 1, *flags, *left_out)
    (problem,) = validate.check(cli.read_config([*MODEL, *map(str, flags)]), 1)
    assert "saved with --no-save-optim" in problem.message and problem.fix == "--no-load-optim"
    with pytest.raises(RanksFailed, match="no random state, as with --no-save-rng: --no-load-rng"):
        train(pool, 1, *flags, "--no-load-optim")
    said = train(pool, 1, *flags, "--no-load-optim", "--no-load-rng")
    assert "training from iteration 1 to 4" in said


def test_pretrained_weights_and_changes_are_told(pool, tmp_path):
    """A run starts from another run's weights, in another layout, as with --finetune; when it
    resumes, it keeps its own, and what has changed is reported."""
    quiet = ["--eval-interval", "0", "--eval-iters", "0", "--train-iters", "4"]
    counted = ["--train-iters", "unset", "--train-samples", "32"]
    train(pool, 1, *quiet, *counted, "--save", tmp_path / "first", "--exit-interval", "1")
    # The iterations that follow from the samples are not in its config.yaml: another batch may be.
    file = str(tmp_path / "first/iter_0000001/config.yaml")
    again = cli.read_config(["--config", file, "--global-batch-size", "4", "--save", "unset"])
    assert again.training.train_samples == 32 and validate.check(again, 1) == []
    tune = [*quiet, "--load", tmp_path / "first", "--finetune"]
    train(pool, 1, *tune, "--metrics-file", tmp_path / "tuned.jsonl")
    flags = [*quiet, *resumable(tmp_path), "--pretrained-checkpoint", tmp_path / "first"]
    said = train(pool, 2, "--pp", "2", *flags, "--exit-interval", "2")
    assert f"weights from {tmp_path}/first/iter_0000001; all else starts from scratch" in said
    for one, other in zip(curve(tmp_path / "m.jsonl"), curve(tmp_path / "tuned.jsonl")):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    changes = "--lr 2e-2 --global-batch-size 4 --clip-grad 0.5 --rng-scheme megatron".split()
    said = train(pool, 1, *flags, *changes, "--norm-epsilon", "1e-4", "--allow-model-change")
    assert f"resumed from {tmp_path}/c/iter_0000002 at iteration 2" in said
    (changes,) = [line for line in said.splitlines() if "changed since" in line]
    for change in (
        "norm_epsilon 1e-05 -> 0.0001",
        "pipeline_model_parallel_size 2 -> 1",
        "lr 0.01 -> 0.02",
        "clip_grad 1.0 -> 0.5",
        "global_batch_size 8 -> 4",
        "rng_scheme global -> megatron",
    ):
        assert change in changes


def wait_for(condition, seconds: float = 60.0) -> None:
    """Poll until the condition holds; fail after a time that only a broken run needs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def blend(folder: Path, **weights: float) -> list[str]:
    """--data-path with these sources of 4,000 tokens, made if they are not there."""
    for name in weights:
        if not (folder / f"{name}.idx").exists():
            with IndexedWriter(folder / name, np.uint16) as writer:
                writer.add_document(np.random.default_rng(ord(name)).integers(0, 131, 4000))
                writer.finish()
    return [
        "--no-mock-data",
        "--data-path",
        *(w for name in weights for w in (str(weights[name]), str(folder / name))),
    ]


def test_a_blend_may_change_in_the_middle(tmp_path):
    """Each source continues from its own position; --allow-data-change must be given."""
    quiet = ["--eval-interval", "0", "--eval-iters", "0", "--split", "1", "--exit-interval", "4"]
    config = [*MODEL, *quiet, "--save", str(tmp_path / "run")]

    def say(*flags: str) -> str:
        """What pretrain_gpt.py says."""
        command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *config, *flags]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        return done.stdout + done.stderr

    say(*blend(tmp_path, a=3, b=1))
    again = [*blend(tmp_path, b=1, c=1), "--load", str(tmp_path / "run")]
    refused = say(*again)
    assert (
        "the training data is not what" in refused and "c is new, or has other contents" in refused
    )
    assert "a is no longer used" in refused and "fix: --allow-data-change" in refused
    said = say(*again, "--allow-data-change")
    assert (
        "the training data changes here" in said
        and "b from sample 8" in said
        and "c from sample 0" in said
    )
    state = json.loads((tmp_path / "run" / "iter_0000008" / "state.json").read_text())["data"]
    assert [(s["consumed"], s["weight"]) for s in state["sources"]] == [(8, 1), (0, 1)] and state[
        "start"
    ] == 32
    assert (
        [s["consumed"] for s in state["before"][0]["sources"]]
        == Blend([3, 1]).counts(32).tolist()
        == [24, 8]
    )


def test_megatrons_order_asks_before_it_becomes_another(tmp_path):
    """Within an epoch the order is the same for any number of iterations; with more epochs, samples
    that were used already are shuffled again."""
    quiet = "--eval-interval 0 --eval-iters 0 --split 1 --sample-order megatron --exit-interval 4".split()  # noqa: E501
    config = [
        *MODEL,
        *quiet,
        *blend(tmp_path, a=1)[:2],
        str(tmp_path / "a"),
        "--save",
        str(tmp_path / "run"),
    ]

    def say(*flags: str) -> str:
        """What pretrain_gpt.py says; 4,000 tokens are 15 iterations of 8 samples of 32."""
        command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *config, *flags]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        return done.stdout + done.stderr

    say("--train-iters", "12")
    again = ["--load", str(tmp_path / "run")]
    refused = say(*again, "--train-iters", "45")
    assert "the training data is not what" in refused and "epochs 1 -> 3" in refused
    assert "fix: --allow-data-change" in refused
    assert "stopped at iteration 8" in say(*again, "--train-iters", "15")
    assert "changes here: epochs 1 -> 3" in say(
        *again, "--train-iters", "45", "--allow-data-change"
    )


def test_megatrons_order_keeps_its_samples_after_other_batches(pool, tmp_path):
    """It depends on how many samples the run takes in all. Twice as many batches of half the size
    take as many: that is offered, and the order is then the same one."""
    flags = [*blend(tmp_path, a=1)[:2], str(tmp_path / "a"), *resumable(tmp_path)]
    flags += "--eval-interval 0 --eval-iters 0 --split 1 --sample-order megatron".split()
    flags = list(map(str, [*flags, "--lr-decay-iters", 32, "--train-iters", 32]))
    train(pool, 1, *flags, "--exit-interval", "4")

    def problems(*more: str) -> list:
        _, asked = cli._read_command_line([*MODEL, *flags, *more], None)
        return validate.check(asked.config, 1, asked.values)

    (problem,) = problems("--global-batch-size", "4")
    assert "epochs 3 -> 2" in problem.message
    assert problem.fix == "--train-iters 60, or --global-batch-size 8"
    smaller = ["--global-batch-size", "4", "--train-iters", "60"]
    assert problems(*smaller) == []
    train(pool, 1, *flags, *smaller)
    state = json.loads((tmp_path / "c" / "iter_0000060" / "state.json").read_text())
    assert state["consumed_samples"] == 32 * 8
    assert (state["data"]["order"]["epochs"], state["data"]["before"]) == (3, [])


def test_schedules_that_count_samples_end_where_other_batches_end(pool, tmp_path):
    """4 iterations of 8 samples, then 4 of 4: 48 samples, where 8 of 4 would be 32. The schedule of
    the second run reaches its end with its last sample; a number of samples is refused by the right
    number of iterations."""
    counted = "--lr-warmup-iters 0 --lr-warmup-samples 4 --lr-decay-style linear --min-lr 0".split()
    flags = [*counted, "--eval-interval", "0", "--eval-iters", "0"]
    train(pool, 1, *flags, *resumable(tmp_path), "--exit-interval", "4")
    flags += [*resumable(tmp_path), "--global-batch-size", "4"]
    with pytest.raises(RanksFailed, match="use --train-iters 8 in its place"):
        train(pool, 1, *flags, "--train-iters", "unset", "--train-samples", "48")
    said = train(pool, 1, *flags, "--train-iters", "8")
    assert "the training and its schedules end at sample 48\n" in said
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows[-4:]]
    assert rates == pytest.approx([1e-2 * (48 - sample) / 44 for sample in (36, 40, 44, 48)])
