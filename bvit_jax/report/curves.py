"""Training curves of runs, read from their ``metrics.jsonl`` and drawn as a PNG file or an HTML page."""

import argparse
import dataclasses
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError

Lines = list[dict[str, Any]]

BOTH = "both"
DASHES = ("solid", "dashed", "dotted", "dashdot")  # of the metrics of one panel
CYCLE = 10  # colours of matplotlib's "tab10"


@dataclass(frozen=True)
class Run:
    """What a training run has logged so far.

    Attributes:
      label: its directory, with as many parents as tell it from the other runs.
      lines: of its ``metrics.jsonl``.
      settings: of its ``config.json``, by dotted name; empty where there is none.
      notes: what was left out, in words.
    """

    label: str
    lines: Lines
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One diagram over the steps.

    Attributes:
      title: with the unit.
      metrics: name in ``metrics.jsonl`` and in the legend.
      factor: from the unit of the file to that of the title.
      points: whether every value is marked, since there are few.
      from_zero: whether the axis begins there, so that heights compare.
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
    """Returns the runs in several directories, one that is named twice only once.

    Raises:
      UserError: a run has no metrics, or they are damaged.
    """
    paths = list(dict.fromkeys(workdir.resolve() for workdir in workdirs))
    return [_read_run(path, label) for path, label in zip(paths, distinct_labels(paths), strict=True)]


def distinct_labels(paths: Sequence[Path]) -> list[str]:
    """Returns the last parts of different absolute paths, as few as tell each from all others."""
    lengths = [1] * len(paths)
    while True:
        labels = ["/".join(path.parts[-n:]) for path, n in zip(paths, lengths, strict=True)]
        counts = Counter(labels)
        if len(counts) == len(labels):
            return [label.encode(errors="replace").decode() for label in labels]
        lengths = [n + (counts[label] > 1) for n, label in zip(lengths, labels, strict=True)]


def _read_run(workdir: Path, label: str) -> Run:
    lines, cut = read_metrics(workdir)
    notes = ["the last line of metrics.jsonl is not whole and was left out"] if cut else []
    try:
        values = json.loads((workdir / "config.json").read_bytes())
        settings = dict(_flat(values)) if isinstance(values, dict) else {}
    except (OSError, ValueError, RecursionError):
        settings = {}
    if not settings:
        notes.append("config.json cannot be read, so that the settings are not known")
    return Run(label, lines, settings, tuple(notes))


def read_metrics(workdir: Path) -> tuple[Lines, bool]:
    """Returns the lines of a run's ``metrics.jsonl``, and whether a last one that is not whole was left out.

    The last line may be in the writing, or cut by a full disk; such a line is no error elsewhere.

    Raises:
      UserError: the file is missing, empty, or damaged anywhere else.
    """
    path = workdir / "metrics.jsonl"
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; expected a workdir of train.py") from error
    rows = [(number, row) for number, row in enumerate(text.split("\n"), 1) if row.strip()]
    lines: Lines = []
    for number, row in rows:
        line = _parsed(row)
        if line is not None:
            lines.append(line)
        elif number < rows[-1][0] or text.endswith("\n"):
            raise UserError(
                f"{path} is damaged: line {number} is no JSON object with a step and numbers; take the line"
                " out of the file"
            )
    if not lines:
        raise UserError(f"{path} is empty: the run has not logged anything yet")
    return lines, len(lines) < len(rows)


def _parsed(row: str) -> dict[str, Any] | None:
    try:
        line = json.loads(row)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    numbers = (value for name, value in line.items() if name != "health")
    return line if all(value is None or type(value) in (int, float) for value in numbers) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# --- what is drawn -----------------------------------------------------------------------------


def panels(runs: Sequence[Run]) -> tuple[Panel, ...]:
    """Returns the diagrams of runs; the loss has a curve for each of its terms that a run has logged."""
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
    """Returns the curves of a diagram, without those that have no value."""
    found = []
    for index, run in enumerate(runs):
        for i, (metric, name) in enumerate(panel.metrics):
            steps, values = series(run.lines, metric, panel.factor)
            if steps:
                found.append(Curve(index, name, DASHES[i % len(DASHES)], steps, values))
    return found


def series(lines: Lines, metric: str, factor: float = 1) -> tuple[list[int], list[float]]:
    """Returns the steps at which a metric was logged and its values, NaN where they were not finite."""
    points = [(line["step"], line[metric]) for line in lines if metric in line]
    values = [
        math.nan if value is None or not math.isfinite(value) else factor * value for _, value in points
    ]
    return [step for step, _ in points], values


def isolated(values: Sequence[float]) -> list[int]:
    """Returns the indices of finite values without a finite neighbour, which no line reaches."""
    padded = [math.nan, *values, math.nan]
    return [
        i
        for i, (before, value, after) in enumerate(zip(padded, values, padded[2:]))
        if math.isfinite(value) and math.isnan(before) and math.isnan(after)
    ]


# --- PNG ---------------------------------------------------------------------------------------


def plot_curves(workdirs: Sequence[Path], output: Path) -> None:
    """Draws loss, held-out accuracy, learning rate and throughput over the steps of one or several runs.

    Raises:
      UserError: a run has no metrics, matplotlib is not installed, or the picture cannot be written.
    """
    _save_picture(read_runs(workdirs), output)


def load_pyplot() -> Any:
    """Returns matplotlib's pyplot, drawing to files; raises `UserError` if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed; pip install 'bvit_jax[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plain(text: str) -> str:
    """Returns a text that matplotlib shows as it is: no formulas, and not left out of a legend."""
    shown = text.replace("$", r"\$").replace("\n", " ")
    return " " + shown if shown.startswith("_") else shown


def _save_picture(runs: Sequence[Run], output: Path) -> None:
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.6), sharex=True, layout="constrained")
    for axis, panel in zip(axes.flat, panels(runs), strict=True):
        _draw_panel(axis, panel, curves(panel, runs))
    handles = [pyplot.Line2D([], [], color=f"C{i % CYCLE}", label=plain(r.label)) for i, r in enumerate(runs)]
    columns = max(1, 110 // (6 + max(len(run.label) for run in runs)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=11)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # of a directory's name
            figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {error}; name a .png or .html file") from error
    finally:
        pyplot.close(figure)


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


# --- the command -------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """Adds ``curves`` to the commands of `bvit_jax.report`."""
    parser = commands.add_parser(
        "curves",
        help="draw the training curves of runs",
        description="Draws the training curves of runs as a picture, or as a page that needs no network.",
    )
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("curves.png"),
        metavar="FILE.png|FILE.html|both",
        help="default: curves.png; both: curves.png and curves.html",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from bvit_jax.report import curves_page

    runs, output = read_runs(arguments.workdirs), arguments.output
    both = str(output) == BOTH
    if both or output.suffix.lower() in (".html", ".htm"):
        curves_page.save_page(runs, Path("curves.html") if both else output)
    if both or output.suffix.lower() not in (".html", ".htm"):
        _save_picture(runs, Path("curves.png") if both else output)
