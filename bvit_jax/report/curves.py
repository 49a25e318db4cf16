"""Pictures of training runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError

Lines = list[dict[str, Any]]

PANELS = (  # metric, factor, title; evaluations are few and drawn as points
    ("loss", 1, "training loss"),
    ("eval_top1", 100, "held-out top-1 (%)"),
    ("learning_rate", 1, "learning rate"),
)


def read_metrics(workdir: Path) -> Lines:
    """Returns the lines of a run's ``metrics.jsonl``; raises `UserError` if it cannot be read."""
    path = workdir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; expected a workdir of train.py") from error
    if not lines:
        raise UserError(f"{path} is empty: the run has not logged anything yet")
    return lines


def _series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_curves(workdirs: Sequence[Path], output: Path) -> None:
    """Draws loss, held-out top-1 and learning rate over the steps of one or several runs.

    Raises:
      UserError: a run has no metrics, matplotlib is not installed, or the picture cannot be written.
    """
    runs = {workdir.name: read_metrics(workdir) for workdir in workdirs}
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed; pip install 'bvit_jax[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 3.2), constrained_layout=True)
    for axis, (name, factor, title) in zip(axes, PANELS):
        marker = "o" if name.startswith("eval_") else None
        for run, lines in runs.items():
            steps, values = _series(lines, name)
            values = [factor * value for value in values]
            axis.plot(steps, values, marker=marker, markersize=4, linewidth=1.5, label=run)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {error}; name a .png file") from error
    finally:
        pyplot.close(figure)
