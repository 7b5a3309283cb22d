"""Draw the loss curves of metrics files (--metrics-file of pretrain_gpt.py) into a picture.

    python tools/plot_metrics.py runs/quickstart/metrics.jsonl --resumed-at 250 --output loss.png
    python tools/plot_metrics.py a.jsonl b.jsonl --output both.png

Thin line: training loss of each iteration. Dots: validation loss. Several files are several runs, compared.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class PlotConfig:
    """What to draw, and where to."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Metrics files, one for each run."""
    output: Path
    """Picture to write; the ending says the format (.png, .svg, .pdf)."""
    resumed_at: tuple[int, ...] = ()
    """Iterations after which a run was resumed: each is marked by a vertical line."""
    title: str = ""
    """Title of the picture."""


@dataclass(frozen=True)
class Curves:
    """The losses of a run: (iteration, loss), in ascending order."""

    training: list[tuple[int, float]]
    validation: list[tuple[int, float]]


class MetricsError(ValueError):
    """A metrics file that cannot be drawn: names the file, the line and the reason."""


def read_curves(path: Path) -> Curves:
    """Read a metrics file. Where a resumed run repeats iterations of a killed one, the later line counts.

    A last line without its end, which a killed run may leave, is passed over. Raises MetricsError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MetricsError(
            f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"
        ) from None
    training, validation = {}, {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            values = json.loads(line)
            if "loss" in values:
                training[values["iteration"]] = values["loss"]
            if "validation_loss" in values:
                validation[values["iteration"]] = values["validation_loss"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise MetricsError(
                f"{path}, line {number}: not an object with an iteration: {line[:60]}"
            ) from None
    if not training and not validation:
        raise MetricsError(f"{path}: no training or validation loss in it")
    return Curves(sorted(training.items()), sorted(validation.items()))


def draw(config: PlotConfig, runs: list[Curves]) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (path, run) in enumerate(zip(config.files, runs, strict=True)):
        color, of = f"C{number}", f" ({path})" if len(runs) > 1 else ""
        if run.training:
            axes.plot(
                *zip(*run.training, strict=True),
                color=color,
                alpha=0.5,
                linewidth=1,
                label=f"training{of}",
            )
        if run.validation:
            axes.plot(
                *zip(*run.validation, strict=True),
                "o-",
                color=color,
                markersize=4,
                markeredgecolor="black",
                label=f"validation{of}",
            )
    for iteration in config.resumed_at:
        axes.axvline(
            iteration, color="gray", linestyle="--", linewidth=1, label=f"resumed at {iteration}"
        )
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=config.title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(config.output, dpi=120)


def main() -> int:
    """Exit status 0, 1 when a file is at fault, 2 when the arguments are."""
    config = tyro.cli(PlotConfig, description=__doc__)
    if not config.files:
        print("error: give at least one metrics file", file=sys.stderr)
        return 2
    try:
        draw(config, [read_curves(path) for path in config.files])
    except ImportError:
        print("error: drawing needs matplotlib: pip install 'megalite[plot]'", file=sys.stderr)
        return 1
    except (
        ValueError,
        OSError,
    ) as error:  # ValueError: also an ending that matplotlib does not know
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(config.output)
    return 0
