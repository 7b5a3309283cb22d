"""Prints the table of docs/schedules.md: what each schedule costs, counted on the schedule.

python -m tests.schedules_table
"""

from megalite.pipeline.messages import is_sent, made
from megalite.pipeline.schedules import SCHEDULES, Orders, Pipeline, peak_in_flight
from megalite.pipeline.simulate import simulate

SIZES = ((4, 8), (8, 32))
"""(p, m) of a pair of columns."""
STAGES = {"gpipe": (1, 2), "interleaved": (2, 4)}
"""Stages on a rank that are shown of a schedule that takes several numbers."""


def lines() -> list[str]:
    """Lines of Markdown."""
    heads = ["schedule", "v"]
    for p, m in SIZES:
        heads += [f"bubble, p = {p}, m = {m}", "in flight", "sent"]
    found = [f"| {' | '.join(heads)} |", "|" + len(heads) * "---|"]
    for name, schedule in SCHEDULES.items():
        for chunks in STAGES.get(name, (schedule.chunks.start,)):
            row = [f"`{name}`", str(chunks)]
            for p, m in SIZES:
                pipeline = Pipeline(p, chunks, schedule.v_shaped)
                row += _cells(schedule.orders(pipeline, m), pipeline, m)
            found.append(f"| {' | '.join(row)} |")
    return found


def _cells(orders: Orders, pipeline: Pipeline, microbatches: int) -> list[str]:
    """Bubble; microbatches in flight on the first and the last rank; messages that the rank which
    sends most sends for a microbatch."""
    bubble = simulate(orders, pipeline).bubble
    held = [sum(peak_in_flight(order).values()) / pipeline.chunks for order in orders]
    sent = 0
    for order in orders:
        sent = max(sent, sum(is_sent(made(action, pipeline), pipeline) for action in order))
    flight = f"{held[0]:g} to {held[-1]:g}" if held[0] != held[-1] else f"{held[0]:g}"
    return [f"{bubble:.1%}", flight, f"{sent / microbatches:g}"]


if __name__ == "__main__":
    print("\n".join(lines()))
