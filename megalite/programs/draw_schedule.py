"""Draw pipeline schedules as they are simulated, or a measured step beside its simulation.

    python tools/draw_schedule.py --pp 4 --microbatches 8 --schedule 1f1b zb-v --output both.svg
    python tools/draw_schedule.py --measured traces/*.json --output step.png

A row is a rank, a box a computation with the number of its microbatch. Later stages of a rank are
lighter. Hatched: the rank waits. Several schedules have one time axis.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megalite.config.cli import parse_options
from megalite.fields import Field
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
PALETTE = 64
"""Colors of a PNG, with those of smooth edges."""


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


@dataclass(frozen=True)
class Panel:
    """One timeline of the picture."""

    title: str
    timeline: Timeline
    pipeline: Pipeline


def problems_with(config: DrawConfig) -> Iterator[str]:
    """What is wrong with the flags together."""
    needed = {"--schedule": config.schedule, "--pp": config.pp}
    needed["--microbatches"] = config.microbatches
    if config.measured is not None:
        idle = [flag for flag, value in {**needed, "--v": config.v}.items() if value is not None]
        for key in ("forward", "input", "weight", "transfer"):
            if getattr(config, key) != getattr(DrawConfig, key):
                idle.append(f"--{key}")
        for flag in idle:
            yield f"{flag} has no effect with --measured: the trace says it"
        return
    missing = [flag for flag, value in needed.items() if value is None]
    if missing:
        yield f"give {' '.join(missing)}, or --measured"
    for name in config.schedule or ():
        if name not in SCHEDULES:
            yield f"--schedule {name}: there are {', '.join(SCHEDULES)}"
        elif config.v is not None and config.v not in SCHEDULES[name].chunks:
            few = SCHEDULES[name].chunks.start
            yield f"--v {config.v} does not fit --schedule {name}: it takes {few}, as without --v"


def simulated_panels(config: DrawConfig) -> list[Panel]:
    """The schedules that the flags name."""
    panels = []
    for name in config.schedule:
        schedule = SCHEDULES[name]
        chunks = config.v or schedule.chunks.start
        pipeline = Pipeline(config.pp, chunks, schedule.v_shaped)
        # The times are those of a whole rank.
        times = {FORWARD: config.forward, INPUT: config.input, WEIGHT: config.weight}
        times[BACKWARD] = config.input + config.weight
        seconds = {kind: time / chunks for kind, time in times.items()}
        orders = schedule.orders(pipeline, config.microbatches)
        timeline = simulate(orders, pipeline, _by_kind(seconds), config.transfer)
        stages = f", v = {chunks}" if chunks > 1 else ""
        title = f"{name}: p = {config.pp}{stages}, m = {config.microbatches}"
        title += f", makespan {timeline.seconds:.4g}, bubble {timeline.bubble:.1%}"
        panels.append(Panel(title, timeline, pipeline))
    return panels


def _by_kind(seconds: dict[str, float]) -> Callable[[Action], float]:
    return lambda action: seconds[action.kind]


def measured_panels(paths: tuple[str, ...]) -> list[Panel]:
    """The last whole step of a trace, and its simulation, in milliseconds. Raises TraceError,
    OSError."""
    measured, pipeline = last_step(read_events(paths))
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

    orders = [[action for action, _, _ in spans] for spans in measured.spans]
    try:
        predicted = simulate(orders, pipeline, mean)
    except ScheduleError as error:
        raise TraceError(f"the step is incomplete: {error}") from None
    longer = measured.seconds / predicted.seconds - 1
    title = f"measured: makespan {measured.seconds:.4g} ms, bubble {measured.bubble:.1%}"
    below = f"simulated from its mean times: makespan {predicted.seconds:.4g} ms, bubble "
    below += f"{predicted.bubble:.1%}; measured is {abs(longer):.1%} "
    below += "longer" if longer >= 0 else "shorter"
    return [Panel(title, measured, pipeline), Panel(below, predicted, pipeline)]


Event = tuple[int, Action, float, float]
"""(rank, action, start, end) in milliseconds."""


def read_events(paths: tuple[str, ...]) -> list[Event]:
    """The actions in Chrome traces, by start. Raises TraceError, OSError."""
    events = []
    for path in paths:
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            found = document["traceEvents"] if isinstance(document, dict) else document
            for event in found:
                if _is_action(event):
                    given = event["args"]
                    action = Action(given["kind"], int(given["microbatch"]), int(given["stage"]))
                    start = event["ts"] / 1000
                    events.append((int(event["pid"]), action, start, start + event["dur"] / 1000))
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError(f"{path}: not a trace of --trace ({error!r})") from None
    if not events:
        raise TraceError(f"{' '.join(paths)}: no forward or backward of a pipeline in it")
    return sorted(events, key=lambda event: event[2])


def _is_action(event: Any) -> bool:
    """Whether an event is a computation of a schedule."""
    if not isinstance(event, dict):
        raise TypeError(f"{event!r} is no event")
    return event.get("ph") == "X" and event.get("args", {}).get("kind") in COLORS


def last_step(events: list[Event]) -> tuple[Timeline, Pipeline]:
    """The last step that all ranks of the first pipeline have whole, from time 0. Raises
    TraceError."""
    # Of ranks that hold the same stages, as data- and tensor-parallel ones do, the first.
    stages_of: dict[int, set[int]] = {}
    for rank, action, _, _ in events:
        stages_of.setdefault(rank, set()).add(action.stage)
    holders: dict[tuple[int, ...], int] = {}
    for rank in sorted(stages_of):
        holders.setdefault(tuple(sorted(stages_of[rank])), rank)
    ranks = sorted(holders.values())
    pipeline = _pipeline_of([sorted(stages_of[rank]) for rank in ranks])
    # An action that comes again begins the next step of its rank.
    steps_of: list[list[list[tuple[Action, float, float]]]] = []
    for rank in ranks:
        steps: list[list[tuple[Action, float, float]]] = [[]]
        seen: set[Action] = set()
        for holder, action, start, end in events:
            if holder != rank:
                continue
            if action in seen:
                steps.append([])
                seen.clear()
            seen.add(action)
            steps[-1].append((action, start, end))
        steps_of.append(steps)
    # Whole: all ranks computed the same microbatches, and backwards.
    for number in reversed(range(min(map(len, steps_of)))):
        spans = [steps[number] for steps in steps_of]
        if _is_whole(spans, pipeline):
            first = min(own[0][1] for own in spans)
            return Timeline(
                [[(a, s - first, e - first) for a, s, e in own] for own in spans]
            ), pipeline
    raise TraceError("no step in the trace is whole on all ranks")


def _pipeline_of(stages_of_ranks: list[list[int]]) -> Pipeline:
    """The pipeline whose ranks hold these stages."""
    chunks = len(stages_of_ranks[0])
    for v_shaped in (False, True):
        pipeline = Pipeline(len(stages_of_ranks), chunks, v_shaped)
        if [pipeline.stages_of(rank) for rank in range(pipeline.ranks)] == stages_of_ranks:
            return pipeline
    raise TraceError(f"stages {stages_of_ranks} of the ranks make no pipeline: traces are missing")


def _is_whole(spans: list[list[tuple[Action, float, float]]], pipeline: Pipeline) -> bool:
    """Whether each stage has a forward and a backward of the same microbatches."""
    done: dict[str, set[tuple[int, int]]] = {kind: set() for kind in COLORS}
    for own in spans:
        for action, _, _ in own:
            done[action.kind].add((action.microbatch, action.stage))
    microbatches = {microbatch for microbatch, _ in done[FORWARD]}
    every = {(m, stage) for m in microbatches for stage in range(pipeline.stages)}
    divided = done[INPUT] == done[WEIGHT] and not done[INPUT] & done[BACKWARD]
    return done[FORWARD] == every == done[BACKWARD] | done[INPUT] and divided


def draw(panels: list[Panel], output: str, unit: str) -> None:
    """Write the picture. Raises ReportedError for an ending that matplotlib does not know."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from PIL import Image

    # Text of an SVG stays text in one named font, and a picture drawn again is the same file.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "megalite"}
    matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]
    heights = [panel.pipeline.ranks for panel in panels]
    figure, all_axes = pyplot.subplots(
        len(panels),
        squeeze=False,
        sharex=True,
        figsize=(WIDTH_INCHES, 0.6 + sum(0.3 * height + 0.6 for height in heights)),
        height_ratios=heights,
        layout="constrained",
    )
    boxes = sum(len(spans) for panel in panels for spans in panel.timeline.spans)
    for panel, axes in zip(panels, all_axes[:, 0]):
        _draw_panel(axes, panel, numbered=boxes <= MOST_NUMBERED)
    all_axes[-1, 0].set_xlabel(f"time ({unit})")
    kinds = {a.kind for panel in panels for spans in panel.timeline.spans for a, _, _ in spans}
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[k], label=LABELS[k]) for k in kinds]
    handles.sort(key=lambda handle: list(LABELS.values()).index(handle.get_label()))
    idle = pyplot.Rectangle((0, 0), 1, 1, **IDLE_STYLE, label="waits")
    figure.legend(handles=[*handles, idle], loc="outside lower center", ncols=5, frameon=False)
    metadata = {"Date": None} if output.endswith(".svg") else None
    try:
        figure.savefig(output, dpi=120, metadata=metadata)
    except ValueError as error:
        raise ReportedError(str(error)) from None
    finally:
        pyplot.close(figure)
    if output.endswith(".png"):  # with so few colors a palette does, in a quarter of the bytes
        Image.open(output).convert("RGB").quantize(PALETTE).save(output, optimize=True)


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
    axes.set_yticklabels([f"rank {rank}" for rank in range(panel.pipeline.ranks)])
    axes.set_xlim(0, None)
    axes.set_title(panel.title, fontsize=10, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)


def _lighter(color: str, share: float) -> tuple[float, float, float]:
    """A color, mixed with white."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (channel + (1 - channel) * share for channel in channels)
    return red, green, blue


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
    print(os.linesep.join([*(panel.title for panel in panels), config.output]))
