"""Training curves of runs, read from their ``metrics.jsonl`` and drawn as a PNG file.

TensorBoard shows the same interactively, if tensorboardX is installed while a run trains.
"""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvit_jax import files
from bvit_jax.errors import UserError
from bvit_jax.workdir.logged import Lines, read_metrics, series

DASHES = ("solid", "dashed", "dotted", "dashdot")  # for the metrics of one panel
CYCLE = 10  # number of matplotlib's default colours


@dataclass(frozen=True)
class Run:
    """What a training run has logged so far.

    Attributes:
      label: the shortest end of its path that no other run has.
      lines: those of its ``metrics.jsonl``.
    """

    label: str
    lines: Lines


@dataclass(frozen=True)
class Panel:
    """One diagram over the steps.

    Attributes:
      title: what is shown, with its unit.
      metrics: names in ``metrics.jsonl`` and in the legend.
      factor: converts the unit of the file to that of the title.
      points: whether to mark every value, where there are few.
      from_zero: whether the axis starts at 0.
    """

    title: str
    metrics: tuple[tuple[str, str], ...]
    factor: float = 1
    points: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Curve:
    """The values of one metric of one run; a value that was not finite is NaN."""

    run: int
    name: str
    dash: str
    steps: list[int]
    values: list[float]


# --- reading -----------------------------------------------------------------------------------


def read_runs(workdirs: Sequence[Path]) -> list[Run]:
    """Returns the runs in several directories, without repetitions.

    Raises:
      UserError: a run has no metrics, or they are damaged.
    """
    paths = list(dict.fromkeys(workdir.resolve() for workdir in workdirs))
    return [Run(label, read_metrics(path)) for path, label in zip(paths, distinct_labels(paths), strict=True)]


def distinct_labels(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of different absolute paths that tell them apart."""
    lengths = [1] * len(paths)
    while True:
        labels = ["/".join(path.parts[-n:]) for path, n in zip(paths, lengths, strict=True)]
        counts = Counter(labels)
        if len(counts) == len(labels):
            return [label.encode(errors="replace").decode() for label in labels]
        lengths = [n + (counts[label] > 1) for n, label in zip(lengths, labels, strict=True)]


# --- what is drawn -----------------------------------------------------------------------------


def panels(runs: Sequence[Run]) -> tuple[Panel, ...]:
    """Returns the diagrams of runs; the loss has a curve for each term that a run has logged."""
    logged = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    terms = [name for name in logged if name.endswith("_loss") and not name.startswith("eval_")]
    named = (("loss", "loss"), *((name, name.replace("_", " ")) for name in sorted(terms)))
    accuracies = (("eval_top1", "top-1"), ("eval_top5", "top-5"), ("eval_ema_top1", "top-1, average weights"))
    return (
        Panel("training loss (nats)", named),
        Panel("held-out accuracy (%)", tuple(a for a in accuracies if a[0] in logged), 100, points=True),
        Panel("learning rate", (("learning_rate", "learning rate"),), from_zero=True),
        Panel("throughput (images/s)", (("images_per_second", "images/s"),), from_zero=True),
    )


def curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    """Returns the curves of a diagram that have values."""
    found = []
    for index, run in enumerate(runs):
        for i, (metric, name) in enumerate(panel.metrics):
            steps, values = series(run.lines, metric, panel.factor)
            if steps:
                found.append(Curve(index, name, DASHES[i % len(DASHES)], steps, values))
    return found


def isolated(values: Sequence[float]) -> list[int]:
    """Returns the indices of finite values without a finite neighbour, which no line passes through."""
    padded = [math.nan, *values, math.nan]
    return [
        i
        for i, (before, value, after) in enumerate(zip(padded, values, padded[2:]))
        if math.isfinite(value) and math.isnan(before) and math.isnan(after)
    ]


# --- PNG ---------------------------------------------------------------------------------------


def new_figure(size: tuple[float, float] = (1, 1)) -> Any:
    """Returns an empty figure of matplotlib, in inches; raises `UserError` if it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; pip install 'bvit_jax[report]'") from None
    return Figure(size, layout="constrained")


def subplots(rows: int, columns: int, *, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Returns a new figure, and its diagrams as an array [rows, columns]; ``options`` are matplotlib's."""
    figure = new_figure(figsize)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plain(text: str) -> str:
    """Returns a text that matplotlib shows unchanged: without formulas, and in legends too."""
    shown = text.replace("$", r"\$").replace("\n", " ")
    return " " + shown if shown.startswith("_") else shown


def save_picture(runs: Sequence[Run], output: Path) -> None:
    """Draws loss, held-out accuracy, learning rate and throughput of runs over their steps.

    Raises:
      UserError: matplotlib is not installed, or the file cannot be written.
    """
    figure, axes = subplots(2, 2, figsize=(11, 6.6), sharex=True)
    from matplotlib.lines import Line2D

    for axis, panel in zip(axes.flat, panels(runs), strict=True):
        _draw_panel(axis, panel, curves(panel, runs))
    handles = [Line2D([], [], color=f"C{i % CYCLE}", label=plain(r.label)) for i, r in enumerate(runs)]
    columns = max(1, 110 // (6 + max(len(run.label) for run in runs)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=11)
    save(figure, output)


def save(figure: Any, output: Path) -> None:
    """Writes a figure, completely or not at all; raises `UserError` if the file cannot be written."""
    try:
        with warnings.catch_warnings(), files.replacing(output) as temporary:
            warnings.filterwarnings("ignore", "Glyph .* missing")  # in the name of a directory
            figure.savefig(temporary, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {error}; name a .png file") from error


def _draw_panel(axis: Any, panel: Panel, drawn: Sequence[Curve]) -> None:
    for curve in drawn:
        axis.plot(
            curve.steps,
            curve.values,
            color=f"C{curve.run % CYCLE}",
            linestyle=curve.dash,
            marker="o",
            markersize=3.5,
            markevery=None if panel.points else isolated(curve.values),
            linewidth=1.5,
        )
    axis.set_title(panel.title, fontsize=12)
    axis.set_xlabel("step")
    axis.tick_params(labelbottom=True)
    if panel.from_zero and drawn:
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    styles = {curve.name: curve.dash for curve in drawn}
    if len(styles) > 1:
        for name, dash in styles.items():
            axis.plot([], [], color="0.3", linestyle=dash, label=name)
        axis.legend(fontsize=9)
    if not drawn:
        axis.text(0.5, 0.5, "none logged", ha="center", va="center", transform=axis.transAxes, color="0.4")
