"""tools/draw_schedule.py: schedules as pictures, and a measured step beside its simulation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.pipeline.schedules import Pipeline, one_forward_one_backward, zb_v
from megalite.pipeline.simulate import Timeline, simulate
from megalite.programs.draw_schedule import (
    DrawConfig,
    TraceError,
    draw,
    measured_panels,
    problems_with,
    simulated_panels,
)

TOOL = Path(__file__).resolve().parents[1] / "tools/draw_schedule.py"
V_SHAPE = Pipeline(3, 2, v_shaped=True)


def events(timeline: Timeline, ranks: list[int], since: float = 0.0) -> list[dict]:
    """The Chrome trace of a timeline in milliseconds, on these ranks of the job."""
    found = []
    for rank, spans in zip(ranks, timeline.spans):
        for action, start, end in spans:
            args = {"kind": action.kind, "microbatch": action.microbatch, "stage": action.stage}
            times = {"ts": 1000 * (since + start), "dur": 1000 * (end - start)}
            name = {"ph": "X", "name": str(action), "pid": rank, "tid": 0}
            found.append({**name, **times, "args": args})
    return found


def write(path: Path, found: list[dict]) -> str:
    path.write_text(json.dumps({"traceEvents": found}))
    return str(path)


def test_boxes_numbers_and_the_titles_of_several_schedules(tmp_path):
    picture = tmp_path / "a.svg"
    config = DrawConfig(str(picture), schedule=("1f1b", "zb-v"), pp=4, microbatches=8)
    panels = simulated_panels(config)
    assert [panel.title for panel in panels] == [
        "1f1b: p = 4, m = 8, makespan 33, bubble 37.5%",
        # Stages of half the layers.
        "zb-v: p = 4, v = 2, m = 8, makespan 25.5, bubble 6.2%",
    ]
    draw(panels, str(picture), "units")
    text = picture.read_text()
    for words in (*(panel.title for panel in panels), "rank 3", "waits", "backward, weights"):
        assert f">{words}</text>" in text
    # A number for each of 4 x 8 x 2 and 4 x 8 x 2 x 3 boxes.
    numbers = re.findall(r">(\d)</text>", text)
    assert len([n for n in numbers if n == "7"]) >= 4 * 2 + 4 * 6
    draw(panels, str(tmp_path / "b.svg"), "units")
    assert (tmp_path / "b.svg").read_text() == text


def test_times_are_those_of_a_rank():
    config = DrawConfig(
        "x.png", ("interleaved",), pp=2, microbatches=4, v=4, forward=2.0, input=3.0, transfer=0.5
    )
    (panel,) = simulated_panels(config)
    assert panel.timeline.busy == pytest.approx([4 * (2 + 3 + 1)] * 2)
    assert panel.timeline.spans[1][0][1] == 2 / 4 + 0.5


def test_a_measured_step_beside_its_simulation(tmp_path):
    """The second of three steps, as the third is cut short. The first rank of each pair that holds
    the same stages is drawn."""

    def seconds(action):
        return 2.0 if action.stage == 4 else 1.0

    timeline = simulate(zb_v(V_SHAPE, 4), V_SHAPE, seconds, transfer_seconds=0.25)
    found = []
    for step in range(3):
        for ranks in ([0, 2, 4], [1, 3, 5]):
            found += events(timeline, ranks, since=1000.0 * step)
    # A file of all ranks, and one that has a part of that again.
    paths = (
        write(tmp_path / "a.json", found[:-40]),
        write(tmp_path / "b.json", [{"ph": "M"}, *found[20:60]]),
    )
    measured, predicted = measured_panels(paths)
    assert measured.pipeline == V_SHAPE
    assert measured.timeline.seconds == pytest.approx(timeline.seconds)
    expected = simulate(zb_v(V_SHAPE, 4), V_SHAPE, seconds).seconds
    assert predicted.timeline.seconds == pytest.approx(expected)
    assert expected < timeline.seconds
    longer = timeline.seconds / expected - 1
    assert f"measured is {longer:.1%} longer" in predicted.title
    draw([measured, predicted], str(tmp_path / "step.png"), "ms")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_mean_times_are_by_kind_and_stage(tmp_path):
    pipeline = Pipeline(1)
    timeline = simulate(
        one_forward_one_backward(pipeline, 2), pipeline, lambda action: 1.0 + action.microbatch
    )
    _, predicted = measured_panels((write(tmp_path / "a.json", events(timeline, [0])),))
    spans = [end - start for _, start, end in predicted.timeline.spans[0]]
    assert spans == pytest.approx([1.5] * 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: [], "no forward or backward of a pipeline"),
        (lambda found: [event for event in found if event["pid"] != 1], "traces are missing"),
        (lambda found: found[:-1], "no step in the trace is whole"),
        (lambda found: [*found, {"ph": "X", "args": {"kind": "F"}}], "not a trace of --trace"),
        (lambda found: "text", "not a trace of --trace"),
    ],
)
def test_traces_that_hold_no_step(tmp_path, change, message):
    pipeline = Pipeline(3)
    timeline = simulate(one_forward_one_backward(pipeline, 3), pipeline)
    path = write(tmp_path / "a.json", change(events(timeline, [0, 1, 2])))
    with pytest.raises(TraceError, match=message):
        measured_panels((path,))


@pytest.mark.parametrize("ranks", [[0], [0, 1], [1, 2, 4]])
def test_traces_of_a_part_of_the_ranks(tmp_path, ranks):
    """The first ranks of a pipeline, or ranks of two pipelines, look like a shorter pipeline, or
    like one: messages say that they are not."""
    pipeline = Pipeline(3)
    timeline = simulate(one_forward_one_backward(pipeline, 3), pipeline)
    found = events(timeline, [0, 2, 4]) + events(timeline, [1, 3, 5])
    for source, target in ((0, 2), (2, 4), (4, 2), (2, 0), (1, 3), (3, 5), (5, 3), (3, 1)):
        args = {"from": source, "to": target, "bytes": 1, "number": 1}
        for rank in (source, target):
            times = {"ts": 0.0, "dur": 1.0, "tid": 1}
            found.append(
                {"ph": "X", "name": "transfer pipeline", "pid": rank, "args": args} | times
            )
    whole = write(tmp_path / "a.json", found)
    assert measured_panels((whole,))[0].timeline.seconds == pytest.approx(timeline.seconds)
    part = write(tmp_path / "b.json", [event for event in found if event["pid"] in ranks])
    with pytest.raises(TraceError, match=r"no whole pipeline|traces are missing"):
        measured_panels((part,))


def test_flags_that_do_not_fit():
    def problems(output="a.svg", **given):
        return list(problems_with(DrawConfig(output, **given)))

    assert problems() == ["give --schedule, --pp and --microbatches, or --measured"]
    sized = dict(pp=2, microbatches=2)
    assert problems(schedule=("1f1b", "zb-v"), **sized) == []
    (unknown,) = problems(schedule=("zb",), **sized)
    assert unknown == "--schedule zb: there are 1f1b, gpipe, interleaved, zb-h1, zb-v"
    (chunks,) = problems(schedule=("interleaved", "zb-v"), v=3, **sized)
    assert chunks == "--v 3 does not fit --schedule zb-v: it takes 2, as without --v"
    (chunks,) = problems(schedule=("gpipe", "interleaved"), v=1, **sized)
    assert chunks == "--v 1 does not fit --schedule interleaved: it takes 2 or more"
    for output in ("a", "."):
        (ending,) = problems(output, schedule=("1f1b",), **sized)
        assert ending.startswith(f"--output {output} has no ending")
    assert len(problems(measured=("a.json",), v=2, **sized)) == 3
    assert len(problems(measured=("a.json",), forward=2.0, transfer=1.0)) == 2


def test_the_tool(tmp_path):
    flags = ["--pp", "2", "--microbatches", "3", "--schedule", "zb-h1"]
    for output, status, words in (("a.svg", 0, "a.svg"), ("a.nonsense", 1, "nonsense")):
        done = subprocess.run(
            [sys.executable, TOOL, *flags, "--output", output],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status and words in done.stdout + done.stderr
    missing = subprocess.run(
        [sys.executable, TOOL, "--measured", "none.json", "--output", "b.svg"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert missing.returncode == 1 and "none.json" in missing.stderr
    assert "Traceback" not in missing.stderr
