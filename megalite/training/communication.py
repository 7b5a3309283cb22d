"""What a step communicated, for the log."""

from collections.abc import Mapping

from megalite.parallel.activity import Traffic
from megalite.parallel.collectives import gather_objects
from megalite.parallel.context import ParallelContext

TITLES = ("group", "kind", "rank", "calls", "MB", "ms", "GB/s")


def communication_table(
    traffic: Mapping[tuple[str, str], Traffic], context: ParallelContext
) -> str:
    """A table of a step's calls by group and kind. Collective over all ranks.

    Each line is of the rank with most bytes in such calls, the lowest one of several. Bytes are
    those of the whole tensors (`Call.bytes`), 1 MB = 10^6 bytes, and the bandwidth is bytes by the
    time that the rank was in the calls or waited for them.

    Args:
        traffic: what this rank has counted, by (group, kind).
        context: of this rank.
    """
    most: dict[tuple[str, str], tuple[int, Traffic]] = {}
    for rank, counted in enumerate(gather_objects(dict(traffic), context.world)):
        for key, theirs in counted.items():
            if key not in most or theirs.bytes > most[key][1].bytes:
                most[key] = (rank, theirs)
    lines = [TITLES]
    for (group, kind), (rank, of_rank) in sorted(most.items()):
        bandwidth = of_rank.bytes / max(of_rank.seconds, 1e-9) / 1e9
        megabytes = f"{of_rank.bytes / 1e6:.3f}"
        times = (f"{1000 * of_rank.seconds:.2f}", f"{bandwidth:.2f}")
        lines.append((group, kind, str(rank), str(of_rank.calls), megabytes, *times))
    return _aligned(lines)


def _aligned(lines: list[tuple[str, ...]]) -> str:
    """Columns of equal width: two of text, the others of numbers."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:2], widths)]
        cells += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:])]
        rows.append("  " + "  ".join(cells))
    return "\n".join(rows)
