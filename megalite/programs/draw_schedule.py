"""Draw pipeline schedules as they are simulated, or a measured step beside its simulation.

    python tools/draw_schedule.py --pp 4 --microbatches 8 --schedule 1f1b zb-v --output both.svg
    python tools/draw_schedule.py --measured traces/trace.json --output step.png

A row is a rank, a box a computation with the number of its microbatch. Later stages of a rank are
lighter. Hatched: the rank waits. Several schedules have one time axis.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from megalite.config.cli import parse_options
from megalite.fields import Field
from megalite.pipeline.messages import validate
from megalite.pipeline.schedules import (
    BACKWARD,
    FORWARD,
    INPUT,
    SCHEDULES,
    WEIGHT,
    Action,
    Pipeline,
    ScheduleError,
)
from megalite.pipeline.simulate import Timeline, simulate
from megalite.programs.reporting import fail, failures_reported
from megalite.system.errors import ReportedError

COLORS = {FORWARD: "#3b75af", BACKWARD: "#519e3e", INPUT: "#57a9a0", WEIGHT: "#e28b3c"}
LABELS = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT: "backward, input",
    WEIGHT: "backward, weights",
}
MOST_NUMBERED = 2500
"""Boxes of a picture up to which each has a number."""
WIDTH_INCHES = 14.0


@dataclass(frozen=True)
class DrawConfig:
    """What to draw, and where to."""

    output: str
    """Picture to write; the ending says the format (.svg, .png, .pdf)."""
    schedule: tuple[str, ...] | None = None
    """Names of schedules (--pipeline-schedule), drawn one under the other."""
    pp: Annotated[int | None, Field(minimum=1)] = None
    """Ranks of the pipeline, p."""
    microbatches: Annotated[int | None, Field(minimum=1)] = None
    """Microbatches of a step, m."""
    v: Annotated[int | None, Field(minimum=1)] = None
    """Stages on each rank. Unset: as few as each schedule takes."""
    forward: Annotated[float, Field(above=0)] = 1.0
    """Time of the forward of a rank's layers."""
    input: Annotated[float, Field(above=0)] = 1.0
    """Time of the gradient of their input."""
    weight: Annotated[float, Field(above=0)] = 1.0
    """Time of the gradients of their weights."""
    transfer: Annotated[float, Field(minimum=0)] = 0.0
    """Time of a message between two ranks."""
    measured: tuple[str, ...] | None = None
    """Chrome traces that --trace has written, in place of schedules: the last whole step in them is
    drawn, and the same order simulated with the mean time of each kind of action on each stage."""


class TraceError(ReportedError):
    """A trace that holds no step of a pipeline: says what is missing."""


Span = tuple[Action, float, float]
"""(action, start, end) in milliseconds."""
Event = tuple[int, Action, float, float]
"""(rank, action, start, end) in milliseconds."""


@dataclass(frozen=True)
class Panel:
    """One timeline of the picture."""

    title: str
    timeline: Timeline
    pipeline: Pipeline


def problems_with(config: DrawConfig) -> Iterator[str]:
    """What is wrong with the flags together."""
    if not Path(config.output).suffix:
        yield f"--output {config.output} has no ending, which says the format: .svg, .png or .pdf"
    if config.measured is not None:
        for entry in fields(DrawConfig):
            unset = getattr(config, entry.name) == entry.default
            if not unset and entry.name not in ("output", "measured"):
                yield f"--{entry.name} has no effect with --measured: the trace says it"
    elif config.schedule is None or config.pp is None or config.microbatches is None:
        yield "give --schedule, --pp and --microbatches, or --measured"
    for name in config.schedule or ():
        if name not in SCHEDULES:
            yield f"--schedule {name}: there are {', '.join(SCHEDULES)}"
        elif config.v is not None and config.v not in SCHEDULES[name].chunks:
            takes = SCHEDULES[name].chunks
            few = f"{takes.start} or more" if len(takes) > 1 else f"{takes.start}, as without --v"
            yield f"--v {config.v} does not fit --schedule {name}: it takes {few}"


def simulated_panels(config: DrawConfig) -> list[Panel]:
    """The schedules that the flags name."""
    panels = []
    for name in config.schedule:
        schedule = SCHEDULES[name]
        chunks = config.v or schedule.chunks.start
        pipeline = Pipeline(config.pp, chunks, schedule.v_shaped)
        orders = schedule.orders(pipeline, config.microbatches)
        timeline = simulate(orders, pipeline, _times(config, chunks), config.transfer)
        stages = f", v = {chunks}" if chunks > 1 else ""
        title = f"{name}: p = {config.pp}{stages}, m = {config.microbatches}"
        title += f", makespan {timeline.seconds:.4g}, bubble {timeline.bubble:.1%}"
        panels.append(Panel(title, timeline, pipeline))
    return panels


def _times(config: DrawConfig, chunks: int) -> Callable[[Action], float]:
    """The time of an action, where a rank's layers are divided into this many stages."""
    times = {FORWARD: config.forward, INPUT: config.input, WEIGHT: config.weight}
    times[BACKWARD] = config.input + config.weight
    return lambda action: times[action.kind] / chunks


def measured_panels(paths: tuple[str, ...]) -> list[Panel]:
    """The last whole step of a trace, and its simulation, in milliseconds. Raises TraceError,
    OSError."""
    measured, pipeline = last_step(*read_events(paths))
    # The mean time of each kind of action on each stage.
    total: dict[tuple[str, int], float] = {}
    count: dict[tuple[str, int], int] = {}
    for spans in measured.spans:
        for action, start, end in spans:
            key = (action.kind, action.stage)
            total[key] = total.get(key, 0.0) + end - start
            count[key] = count.get(key, 0) + 1

    def mean(action: Action) -> float:
        key = (action.kind, action.stage)
        return total[key] / count[key]

    orders = []
    for spans in measured.spans:
        orders.append([action for action, _, _ in spans])
    predicted = simulate(orders, pipeline, mean)
    longer = measured.seconds / predicted.seconds - 1
    title = f"measured: makespan {measured.seconds:.4g} ms, bubble {measured.bubble:.1%}"
    below = f"simulated from its mean times: makespan {predicted.seconds:.4g} ms, bubble "
    below += f"{predicted.bubble:.1%}; measured is {abs(longer):.1%} "
    below += "longer" if longer >= 0 else "shorter"
    return [Panel(title, measured, pipeline), Panel(below, predicted, pipeline)]


def read_events(paths: tuple[str, ...]) -> tuple[list[Event], set[tuple[int, int]]]:
    """The actions in Chrome traces, each once, by start, and the pairs of ranks (from, to) between
    which a pipeline's messages went. Raises TraceError, OSError."""
    events = []
    pairs = set()
    for path in paths:
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            found = document["traceEvents"] if isinstance(document, dict) else document
            for event in found:
                if not isinstance(event, dict):
                    raise TypeError(f"{event!r} is no event")
                if event.get("name") == "transfer pipeline":
                    pairs.add((int(event["args"]["from"]), int(event["args"]["to"])))
                elif _is_action(event):
                    given = event["args"]
                    action = Action(given["kind"], int(given["microbatch"]), int(given["stage"]))
                    start = event["ts"] / 1000
                    events.append((int(event["pid"]), action, start, start + event["dur"] / 1000))
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError(f"{path}: not a trace of --trace ({error!r})") from None
    if not events:
        raise TraceError(f"{' '.join(paths)}: no forward or backward of a pipeline in it")
    # trace.json and the files of ranks hold the same events.
    return sorted(set(events), key=lambda event: event[2]), pairs


def _is_action(event: dict) -> bool:
    """Whether an event is a computation of a schedule."""
    return event.get("ph") == "X" and event.get("args", {}).get("kind") in COLORS


def last_step(events: list[Event], pairs: set[tuple[int, int]]) -> tuple[Timeline, Pipeline]:
    """The last step that all ranks of the first pipeline have whole, from time 0. Raises
    TraceError, also where these ranks exchange messages with others."""
    spans_of: dict[int, list[Span]] = {}
    for rank, action, start, end in events:
        spans_of.setdefault(rank, []).append((action, start, end))
    # Of ranks that hold the same stages, as data- and tensor-parallel ones do, the first.
    first_with: dict[tuple[int, ...], int] = {}
    for rank in sorted(spans_of):
        stages = sorted({action.stage for action, _, _ in spans_of[rank]})
        first_with.setdefault(tuple(stages), rank)
    pipeline = _pipeline_of([list(stages) for stages in first_with])
    ranks = list(first_with.values())
    for source, target in sorted(pairs):
        if (source in ranks) != (target in ranks):
            raise TraceError(
                f"the traces hold stages of ranks {ranks}, which are no whole pipeline: rank "
                f"{source} sends to rank {target}. Give the traces of all ranks"
            )
    steps_of = []
    for rank in first_with.values():
        steps_of.append(_steps(spans_of[rank]))
    for spans in reversed(list(zip(*steps_of))):
        if _is_whole(spans, pipeline):
            return Timeline(_from_zero(spans)), pipeline
    raise TraceError("no step in the trace is whole on all ranks")


def _steps(spans: list[Span]) -> list[list[Span]]:
    """A rank's spans by step: an action that comes again begins the next one."""
    steps: list[list[Span]] = [[]]
    seen: set[Action] = set()
    for span in spans:
        if span[0] in seen:
            steps.append([])
            seen.clear()
        seen.add(span[0])
        steps[-1].append(span)
    return steps


def _from_zero(spans_of_ranks: tuple[list[Span], ...]) -> list[list[Span]]:
    """The spans with times since the first start."""
    first = min(spans[0][1] for spans in spans_of_ranks)
    moved = []
    for spans in spans_of_ranks:
        moved.append([(action, start - first, end - first) for action, start, end in spans])
    return moved


def _pipeline_of(stages_of_ranks: list[list[int]]) -> Pipeline:
    """The pipeline whose ranks hold these stages."""
    chunks = len(stages_of_ranks[0])
    for v_shaped in (False, True):
        pipeline = Pipeline(len(stages_of_ranks), chunks, v_shaped)
        if list(map(pipeline.stages_of, range(pipeline.ranks))) == stages_of_ranks:
            return pipeline
    raise TraceError(f"stages {stages_of_ranks} of the ranks make no pipeline: traces are missing")


def _is_whole(spans_of_ranks: tuple[list[Span], ...], pipeline: Pipeline) -> bool:
    """Whether the ranks computed all that a step of some number of microbatches has."""
    orders = []
    most = 0
    for spans in spans_of_ranks:
        orders.append([action for action, _, _ in spans])
        most = max(most, *(action.microbatch for action in orders[-1]))
    try:
        validate(orders, pipeline, most + 1)
    except ScheduleError:
        return False
    return True


def draw(panels: list[Panel], output: str, unit: str) -> None:
    """Write the picture. Raises ReportedError for an ending that matplotlib does not know."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # Text of an SVG stays text in one named font, and a picture drawn again is the same file.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "megalite"}
    matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]
    rows = []
    boxes = 0
    kinds = set()
    for panel in panels:
        rows.append(panel.pipeline.ranks)
        for spans in panel.timeline.spans:
            boxes += len(spans)
            kinds |= {action.kind for action, _, _ in spans}
    figure, all_axes = pyplot.subplots(
        len(panels),
        squeeze=False,
        sharex=True,
        figsize=(WIDTH_INCHES, 0.6 + 0.6 * len(rows) + 0.3 * sum(rows)),
        height_ratios=rows,
        layout="constrained",
    )
    for panel, axes in zip(panels, all_axes[:, 0]):
        _draw_panel(axes, panel, numbered=boxes <= MOST_NUMBERED)
    all_axes[-1, 0].set_xlabel(f"time ({unit})")
    handles = []
    for kind, label in LABELS.items():
        if kind in kinds:
            handles.append(pyplot.Rectangle((0, 0), 1, 1, color=COLORS[kind], label=label))
    idle = pyplot.Rectangle((0, 0), 1, 1, **IDLE_STYLE, label="waits")
    figure.legend(handles=[*handles, idle], loc="outside lower center", ncols=5, frameon=False)
    metadata = {"Date": None} if output.endswith(".svg") else None
    try:
        figure.savefig(output, dpi=120, metadata=metadata)
    except ValueError as error:
        raise ReportedError(str(error)) from None
    finally:
        pyplot.close(figure)


IDLE_STYLE = {"facecolor": "#f2f2f2", "edgecolor": "#c8c8c8", "hatch": "////", "linewidth": 0}


def _draw_panel(axes: Any, panel: Panel, numbered: bool) -> None:
    """A row for each rank, the first on top."""
    end = panel.timeline.seconds
    for rank, spans in enumerate(panel.timeline.spans):
        own = panel.pipeline.stages_of(rank)
        axes.broken_barh([(0, end)], (rank - 0.45, 0.9), **IDLE_STYLE)
        boxes: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for action, start, stop in spans:
            chunk = own.index(action.stage)
            boxes.setdefault((action.kind, chunk), []).append((start, stop - start))
            if numbered:
                axes.text(
                    (start + stop) / 2,
                    rank,
                    str(action.microbatch),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if chunk else "white",
                )
        for (kind, chunk), places in boxes.items():
            color = _lighter(COLORS[kind], 0.6 * chunk / max(1, len(own) - 1))
            axes.broken_barh(
                places, (rank - 0.45, 0.9), facecolor=color, edgecolor="white", linewidth=0.5
            )
    axes.set(yticks=range(panel.pipeline.ranks), ylim=(panel.pipeline.ranks - 0.5, -0.5))
    axes.yaxis.set_major_formatter("rank {x:.0f}")
    axes.set_xlim(0, None)
    axes.set_title(panel.title, fontsize=10, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)


def _lighter(color: str, share: float) -> tuple[float, ...]:
    """A color, mixed with white."""
    channels = []
    for place in (1, 3, 5):
        channel = int(color[place : place + 2], 16) / 255
        channels.append(channel + (1 - channel) * share)
    return tuple(channels)


def main() -> None:
    """Exit status 0, 1 when a file is at fault, 2 when the arguments are."""
    config = parse_options(DrawConfig, __doc__, check=problems_with)
    with failures_reported():
        if config.measured is not None:
            panels = measured_panels(config.measured)
        else:
            panels = simulated_panels(config)
        try:
            draw(panels, config.output, "ms" if config.measured else "units of the times given")
        except ImportError:
            fail("drawing needs matplotlib: pip install 'megalite[plot]'")
    for panel in panels:
        print(panel.title)
    print(config.output)
