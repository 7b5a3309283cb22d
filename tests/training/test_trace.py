"""--trace: what is in it, in which order, by whose clock; and what happens when it cannot be
written."""

import json
import re
import shutil
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megalite.config import cli, validate
from megalite.parallel.clocks import clock_offset
from megalite.parallel.layout import ParallelLayout
from megalite.pipeline.schedules import pipeline_of, training_orders
from megalite.training.build import build_model
from tests.layouts import Layout
from tests.runs import ALONE, console_of
from tests.tiny import build

MODEL = """
    --mock-data --vocab-size 61 --num-layers 4 --hidden-size 16 --num-attention-heads 4
    --seq-length 16 --device cpu --global-batch-size 8 --eval-interval 0 --eval-iters 0
    --train-iters 4 --trace traces
""".split()


def configured(flags: list[str], ranks: int):
    return validate.resolve(cli.read_config([*MODEL, *flags]), ranks)


def train(launch, flags: list[str], folder: Path, build_model=build_model) -> str:
    config = configured(flags, launch.world_size)
    return console_of(launch, config, folder, build_model)


def events_of(file: Path, **equal) -> list[dict]:
    """The events of a trace that have these values."""
    events = json.loads(file.read_text())["traceEvents"]
    return [e for e in events if all(e.get(key) == value for key, value in equal.items())]


def nanoseconds(microseconds: float) -> int:
    return round(1000 * microseconds)


def end(event: dict) -> int:
    return nanoseconds(event["ts"]) + nanoseconds(event["dur"])


@pytest.fixture(scope="module", params=["1f1b", "zb-v"])
def traced(request, pool, tmp_path_factory):
    """(configuration, folder of the traces) of iterations 2 and 3 of a run on four ranks."""
    folder = tmp_path_factory.mktemp("traced")
    flags = ["--pp", "2", "--trace-iterations", "2-3"]
    flags += {"1f1b": [], "zb-v": ["--tp", "2", "--pipeline-schedule", "zb-v"]}[request.param]
    printed = pool.run(train, 4, flags, folder, timeout=200)[0]
    assert "trace of iterations 2 to 3: traces/trace.json; clocks agree to " in printed
    return configured(flags, 4), folder / "traces"


def test_a_trace_holds_the_schedule_in_order(traced):
    config, folder = traced
    p = config.parallel
    sizes = (p.tensor_model_parallel_size, p.pipeline_model_parallel_size)
    layout = ParallelLayout(tensor=sizes[0], pipeline=2, data=2 // sizes[0])
    microbatches = 8 // layout.sizes["data"]
    orders = training_orders(p, microbatches)
    for rank in range(4):
        for iteration in (2, 3):
            ran = []
            for event in events_of(folder / "trace.json", ph="X", pid=rank, tid=0):
                arguments = event["args"]
                if event["cat"] != "optimizer" and arguments["iteration"] == iteration:
                    action = [arguments[key] for key in ("kind", "microbatch", "stage")]
                    assert event["name"] == f"{action[0]}{action[1]}"
                    category = {"F": "forward", "W": "weight"}.get(action[0], "backward")
                    assert event["cat"] == category
                    ran.append(tuple(action))
            assert ran == orders[layout.coordinates(rank)["pipeline"]]
    names = [e["args"]["name"] for e in events_of(folder / "trace.json", name="process_name")]
    last = {1: "rank 3 (tp 0, dp 1, pp 1)", 2: "rank 3 (tp 1, dp 0, pp 1)"}[sizes[0]]
    assert names[3] == last and len(names) == 4


def test_what_a_thread_of_a_trace_does_follows_one_another(traced):
    threads = defaultdict(list)
    for event in events_of(traced[1] / "trace.json", ph="X"):
        assert event["ts"] >= 0 and event["dur"] >= 0
        threads[event["pid"], event["tid"]].append(event)
    assert set(threads) == {(rank, thread) for rank in range(4) for thread in range(3)}
    for (_, thread), events in threads.items():
        for before, after in pairwise(events):
            assert end(before) <= nanoseconds(after["ts"])
        if thread == 2:
            assert [event["name"] for event in events] == ["data", "data"]
        if thread == 0:
            assert [event["name"] for event in events].count("optimizer") == 2
        if thread == 1:
            assert all(event["cat"] == "communication" for event in events)
            hidden = [event for event in events if event["name"] == "transfer pipeline"]
            assert {event["args"]["bytes"] for event in hidden} == {16 * 16 * 4}  # [s, b, h], fp32


def test_clocks_of_one_host_agree_and_no_microbatch_arrives_before_it_is_sent(traced):
    """All ranks have one clock here: the offset that is found is the error, within its bound."""
    config, folder = traced
    clocks = json.loads((folder / "trace.json").read_text())["otherData"]["clocks"]
    assert [clock["rank"] for clock in clocks] == [0, 1, 2, 3]
    errors = {}
    for clock in clocks:
        errors[clock["rank"]] = clock["error_us"]
        assert abs(clock["offset_us"]) <= clock["error_us"] + 0.001  # both are rounded
    pipeline = pipeline_of(config.parallel)
    ended, began, compared = {}, {}, 0
    for event in events_of(folder / "trace.json", ph="X", cat="forward"):
        arguments = event["args"]
        of = (arguments["iteration"], arguments["microbatch"], event["pid"] % 2)
        ended[of, arguments["stage"]] = (event["ts"] + event["dur"], event["pid"])
        began[of, arguments["stage"]] = (event["ts"], event["pid"])
    for (of, stage), (start, rank) in began.items():
        if stage > 0:
            sent, sender = ended[of, stage - 1]
            assert start >= sent - errors[rank] - errors[sender]
            compared += 1
    replicas = 2 // config.parallel.tensor_model_parallel_size
    microbatches = 2 * (8 // replicas)
    assert compared == microbatches * (pipeline.stages - 1) * 2


def test_each_rank_has_a_file_of_its_own(traced):
    _, folder = traced
    files = sorted(path.name for path in folder.iterdir())
    assert files == [*(f"trace-rank-0000{rank}.json" for rank in range(4)), "trace.json"]
    for rank in range(4):
        own = events_of(folder / f"trace-rank-0000{rank}.json")
        assert own == events_of(folder / "trace.json", pid=rank)


def test_the_command_of_the_page_passes_the_checks():
    page = (Path(__file__).resolve().parents[2] / "docs" / "tracing.md").read_text()
    (command,) = re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
    ranks, flags = re.fullmatch(
        r"torchrun --nproc-per-node (\d) pretrain_gpt.py (.*)\n", command
    ).groups()
    assert validate.check(cli.read_config(flags.split()), int(ranks)) == []


def offset_of_a_late_clock(launch) -> tuple[float, float]:
    tiny = build(Layout("data", dp=2), launch)
    rank = tiny.context.rank
    found = clock_offset(tiny.context.control, lambda: time.monotonic() - 5 * rank)
    return found.seconds, found.error


def test_the_offset_of_a_clock_is_found(pool):
    """Rank 1's clock is 5 s late. On one host nothing else is between them."""
    (first, second) = pool.run(offset_of_a_late_clock, 2)
    assert first == (0, 0)
    assert abs(second[0] - 5) <= second[1] + 1e-9 and second[1] < 5


def test_a_trace_ends_with_the_run(tmp_path):
    assert "no trace: the run has ended before iteration 3" in train(
        ALONE, ["--exit-interval", "2"], tmp_path / "a"
    )
    assert not list((tmp_path / "a" / "traces").iterdir())
    assert "trace of iterations 3 to 4: traces/trace.json; clocks agree to 0 us" in train(
        ALONE, [], tmp_path / "b"
    )
    traced = json.loads((tmp_path / "b" / "traces" / "trace.json").read_text())
    assert traced["otherData"]["iterations"] == [3, 4]


def test_a_resumed_run_keeps_the_trace_of_its_beginning(tmp_path):
    flags = ["--save", "run", "--load", "run", "--trace-iterations", "1-1"]
    train(ALONE, [*flags, "--exit-interval", "2"], tmp_path)
    before = (tmp_path / "traces" / "trace.json").read_bytes()
    assert "no trace: it would begin at iteration 1, this run begins at 3" in train(
        ALONE, flags, tmp_path
    )
    assert "no trace: --trace traces holds that of an earlier run" in train(
        ALONE, [*flags[:-1], "5-5", "--train-iters", "5"], tmp_path
    )
    assert (tmp_path / "traces" / "trace.json").read_bytes() == before


def test_a_full_disk_is_found_before_training(tmp_path, capsys):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "trace-rank-00000.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*trace-rank-00000.json.tmp"):
        train(ALONE, [], tmp_path)
    assert not list((tmp_path / "traces").iterdir())


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path):
    def without_folder(config, context, rng):
        model = build_model(config, context, rng)

        def removed(*unused):
            shutil.rmtree("traces", ignore_errors=True)

        model.stages[0].register_forward_pre_hook(removed)
        return model

    printed = train(ALONE, [], tmp_path, without_folder)
    assert printed.count("rank 0: a trace was not written: ") == 2
    assert "stopped at iteration 4" in printed and "trace of iterations" not in printed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_trace_of_a_gpu_has_the_times_of_the_gpu(tmp_path):
    """A product of large matrices after each forward is launched at once, and takes its time."""
    seconds = []

    def slow(config, context, rng):
        model = build_model(config, context, rng)

        def multiply(*unused):
            x = torch.ones(8192, 8192, device="cuda")
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            x @ x
            ended.record()
            seconds.append((began, ended))

        model.stages[0].register_forward_hook(multiply)
        return model

    train(ALONE, ["--device", "cuda", "--trace-iterations", "4-4"], tmp_path, slow)
    forwards = events_of(tmp_path / "traces" / "trace.json", cat="forward")
    for event, (began, ended) in zip(forwards, seconds[-8:], strict=True):
        assert event["dur"] >= 1000 * began.elapsed_time(ended) - 1
