"""Plot the loss curves of metrics files (--metrics-file of pretrain_gpt.py).

    python tools/plot_metrics.py runs/quickstart/metrics.jsonl --resumed-at 250 --output loss.png
    python tools/plot_metrics.py a.jsonl b.jsonl --output both.png

Thin line: training loss of each iteration. Dots: validation loss. Several files are several runs,
compared.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megalite.config.cli import parse_options
from megalite.fields import Field
from megalite.programs.reporting import fail, failures_reported, refuse
from megalite.system.errors import ReportedError


@dataclass(frozen=True)
class PlotConfig:
    """What to plot, and where to."""

    files: Annotated[tuple[str, ...], Field(positional=True)]
    """Metrics files, one for each run."""
    output: str
    """Picture to write; the ending says the format (.png, .svg, .pdf)."""
    resumed_at: tuple[str, ...] = ()
    """Iterations after which a run was resumed: each is marked by a vertical line."""
    title: str = ""
    """Title of the picture."""


@dataclass(frozen=True)
class Curves:
    """The losses of a run: (iteration, loss), in ascending order."""

    training: list[tuple[int, float]]
    validation: list[tuple[int, float]]


class MetricsError(ReportedError):
    """A metrics file that cannot be plotted: names the file, the line and the reason."""


def read_curves(path: Path) -> Curves:
    """Read a metrics file. Where a resumed run repeats iterations of a killed one, the later line
    counts.

    An incomplete last line, which a killed run may leave, is ignored. Raises MetricsError, OSError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise MetricsError(f"{path}: not UTF-8 text") from None
    training = {}
    validation = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            values = json.loads(line)
            if "loss" in values:
                training[values["iteration"]] = values["loss"]
            if "validation_loss" in values:
                validation[values["iteration"]] = values["validation_loss"]
        except (json.JSONDecodeError, TypeError, KeyError):
            where = f"{path}, line {number}"
            message = f"{where}: not an object with an iteration: {line[:60]}"
            raise MetricsError(message) from None
    if not training and not validation:
        raise MetricsError(f"{path}: no training or validation loss in it")
    return Curves(sorted(training.items()), sorted(validation.items()))


def draw(config: PlotConfig, runs: list[Curves]) -> None:
    """Write the picture. Raises MetricsError for a suffix that matplotlib does not know."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    training_style = dict(alpha=0.5, linewidth=1)
    validation_style = dict(marker="o", markersize=4, markeredgecolor="black")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (path, run) in enumerate(zip(config.files, runs, strict=True)):
        of = f" ({path})" if len(runs) > 1 else ""
        for curve, kind, style in (
            (run.training, f"training{of}", training_style),
            (run.validation, f"validation{of}", validation_style),
        ):
            if curve:
                axes.plot(*zip(*curve), color=f"C{number}", label=kind, **style)
    for iteration in config.resumed_at:
        label = f"resumed at {iteration}"
        axes.axvline(int(iteration), color="gray", linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=config.title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(config.output, dpi=120)
    except ValueError as error:
        raise MetricsError(str(error)) from None


def main() -> None:
    """Exit status 0, 1 when a file is at fault, 2 when the arguments are."""
    config = parse_options(PlotConfig, __doc__)
    wrong = [word for word in config.resumed_at if not word.isdecimal()]
    refuse([f"--resumed-at {word}: give the number of an iteration" for word in wrong])
    with failures_reported():
        try:
            draw(config, [read_curves(Path(path)) for path in config.files])
        except ImportError:
            fail("plotting needs matplotlib: pip install 'megalite[plot]'")
    print(config.output)
