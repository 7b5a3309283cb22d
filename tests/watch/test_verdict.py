"""Who is blamed for a hang, from the reports of all ranks. Pure."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import pytest

from megalite.parallel.activity import Activity
from megalite.parallel.layout import ParallelLayout
from megalite.pipeline.schedules import Action, Pipeline, describe
from megalite.watch.verdict import Report, blocking_ranks, hang_verdict


def report(
    rank: int, *calls: tuple, waits: bool = True, idle: float = 9.0, blocks: bool = True, **rest
) -> Report:
    """A rank that has begun these calls (kind, group, ranks), and waits in the last one."""
    activity = Activity()
    activity.set_state("training", 3)
    begun = [activity.record(*call, shape=(4,), dtype="float32") for call in calls]
    activity.waiting = begun[-1] if begun and waits and blocks else None
    who = {"rank": rank, "host": f"node{rank // 2}", "pid": 100 + rank}
    return Report.of(activity, **who, idle_seconds=idle, blocks=blocks, **rest)


def blamed(*reports: Report) -> list[int]:
    return list(blocking_ranks(by_rank(reports), 4.0)[0])


def by_rank(reports: Iterable[Report]) -> dict[int, Report]:
    return {report.rank: report for report in reports}


TENSOR, DATA = ("all_reduce", "tensor", (0, 1)), ("all_reduce", "data", (0, 2))
SEND = ("transfer", "pipeline", (0, 2))


@pytest.mark.parametrize("blocks", [True, False], ids=["gloo", "nccl"])
def test_the_one_that_all_wait_for_in_the_end(blocks):
    """2 waits for 0, which waits for 1, which computes."""
    reports = [
        report(0, TENSOR, blocks=blocks), report(1, blocks=blocks), report(2, DATA, blocks=blocks)
    ]  # fmt: skip
    assert blamed(*reports) == [1]
    said = hang_verdict(by_rank(reports), 9, 4.0, "x.txt")
    assert (
        "waiting for rank 1" in said
        and "rank 1 on node0 (process 101): training, step 3; in no call" in said
    )
    assert "missing from all_reduce of [4] float32, call 1 of the tensor group (ranks 0, 1)" in said
    assert "where rank 0 on node0 (process 100) has waited for 9 s" in said and "x.txt" in said


def test_both_ends_of_a_transfer_have_one_name():
    assert blamed(report(0, SEND), report(2, SEND, idle=1.0)) == [
        0,
        2,
    ]  # both are in it: nobody is missing
    assert blamed(report(0), report(2, SEND)) == [0]
    assert blamed(report(0, SEND, SEND), report(2, SEND, waits=False)) == [2]


def test_the_call_that_was_waited_in_first_is_named():
    reports = {
        0: report(0, DATA, idle=3.0),
        1: report(1, ("barrier", "world", (0, 1, 2)), idle=8.0),
        2: report(2),
    }
    assert blocking_ranks(reports, 4.0)[0][2][1] == 1


def test_a_rank_that_does_not_answer_is_to_blame_whatever_it_was_in():
    reports = {0: report(0, TENSOR, TENSOR), 1: report(1, TENSOR, DATA), 2: report(2)}
    assert list(blocking_ranks(reports, 4.0)[0]) == [2]
    reports[1] = report(1, TENSOR, ("transfer", "pipeline", (1, 2)), silent_seconds=5.0)
    assert 1 in blocking_ranks(reports, 4.0)[0]
    assert "does not answer" in hang_verdict(reports, 9, 4.0, "x")


def test_a_circle_of_ranks_that_wait_for_each_other():
    reports = {0: report(0, TENSOR), 1: report(1, ("all_reduce", "world", (0, 1)))}
    assert list(blocking_ranks(reports, 4.0)[0]) == [0, 1]
    assert "ranks 0, 1 wait for each other" in hang_verdict(reports, 9, 4.0, "x")


def test_on_gpus_a_transfer_that_nobody_receives_does_not_hide_who_stands_still():
    """Rank 0 has sent to 2 and hangs; 2 has not received, since it waits for an all-reduce of 0."""
    reports = {0: report(0, SEND, blocks=False), 2: report(2, DATA, blocks=False, idle=8.0)}
    assert list(blocking_ranks(reports, 4.0)[0]) == [0]


def test_one_rank_alone_that_stands_still():
    assert blamed(report(0)) == [0]
    assert blamed(report(0, idle=0.0), report(1)) == [1]


def test_what_each_rank_was_computing_is_named():
    """The stage only where a rank holds several."""
    single, several = (Pipeline(ranks=4, chunks=chunks) for chunks in (1, 2))
    activity = Activity()
    activity.set_state("training", 3)
    assert Report.of(activity, rank=2, host="a", pid=7).doing == "training, step 3; in no call"
    activity.action = Action("F", microbatch=5, stage=6)
    for pipeline, place in ((single, ""), (several, " on stage 6 (chunk 1)")):
        activity.name_of = partial(describe, pipeline=pipeline)
        doing = f"training, step 3, forward of microbatch 5{place}"
        stuck = Report.of(activity, rank=2, host="a", pid=7)
        assert stuck.doing == f"{doing}; in no call"
        assert Report.from_json(stuck.to_json()) == stuck
        waits = replace(report(0, SEND), action="backward of microbatch 1")
        said = hang_verdict({0: waits, 2: stuck}, 9, 4.0, "x")
        assert f"rank 2 on a (process 7): {doing}; in no call" in said
        assert "has waited for 9 s in its backward of microbatch 1\n" in said
    activity.set_state("saving")
    assert Report.of(activity, rank=2, host="a", pid=7).doing == "saving, step 3; in no call"


def test_a_report_travels_as_text():
    made = report(1, TENSOR, SEND, ("barrier", "world", range(0, 8, 2)), stack="a\n", beat=3)
    assert Report.from_json(made.to_json()) == made


def large_job(data: int, blocks: bool) -> dict[int, Report]:
    """Reports of a job of tp=8 x pp=4: rank 13 computes, 8-15 wait for it, all others for those."""
    layout = ParallelLayout(tensor=8, pipeline=4, data=data)
    groups = defaultdict(list)
    for axis in ("pipeline", "data", "tensor"):
        for members in layout.groups(axis):
            for rank in members:
                groups[rank].append(("all_reduce", axis, members))
    world = ("all_reduce", "world", range(layout.world_size))
    made = {}
    for rank, (pipeline, across, tensor) in groups.items():
        calls = [world, ("barrier", "control", world[2]), *[pipeline, across, tensor] * 3]
        first = 8 <= rank < 16
        if rank != 13:
            calls.append(tensor if first else world)
        told = report(rank, *calls, waits=rank != 13, idle=10.0 if first else 9.0, blocks=blocks)
        made[rank] = Report.from_json(told.to_json())
    return made


def bytecodes(action: Callable) -> int:
    """Number of bytecodes an action executes: its cost, whatever else the machine does."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes, count = True, count + 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("blocks", [True, False], ids=["gloo", "nccl"])
def test_a_thousand_ranks_are_judged_eight_times_as_long_as_128(blocks):
    small, large = large_job(4, blocks), large_job(32, blocks)
    assert (len(small), len(large)) == (128, 1024)
    for reports in small, large:
        assert list(blocking_ranks(reports, 4.0)[0]) == [13]
        assert "of the tensor group (ranks 8, 9, 10, 11, 12, 13, 14, 15)" in hang_verdict(
            reports, 9, 4.0, "x"
        )
    few = bytecodes(lambda: hang_verdict(small, 9, 4.0, "x"))
    many = bytecodes(lambda: hang_verdict(large, 9, 4.0, "x"))
    assert many < 12 * few


def largest_report(reports: dict[int, Report]) -> int:
    return max(len(report.to_json()) for report in reports.values())


def test_a_report_is_no_larger_in_a_large_job():
    small, large = (largest_report(large_job(data, True)) for data in (4, 32))
    assert large < small + 50 and large < 2000
