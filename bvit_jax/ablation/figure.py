"""The results of a study as a picture: accuracy in the course of training, and of every run at its end."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bvit_jax.ablation.runs import Result, workdir_of
from bvit_jax.ablation.study import Study
from bvit_jax.ablation.table import of_row
from bvit_jax.report import curves
from bvit_jax.workdir.logged import read_metrics, series


def save_figure(study: Study, results: Sequence[Result], directory: Path, output: Path) -> None:
    """Draws the mean accuracy of the seeds over the steps, and a dot for each run.

    Raises:
      UserError: matplotlib is not installed, or the file cannot be written.
    """
    rows = [row for row in study.rows if of_row(results, row)]
    figure, axes = curves.subplots(1, 2, figsize=(11, 1.6 + 0.42 * max(len(rows), 6)))
    over_steps, at_end = axes[0]
    for index, row in enumerate(rows):
        runs, color = of_row(results, row), f"C{index % curves.CYCLE}"
        by_step: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            lines = read_metrics(workdir_of(directory, row, run.seed))
            steps, values = series(lines, "eval_top1", 100)
            over_steps.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
            for step, value in zip(steps, values, strict=True):
                by_step[step].append(value)
        shared = {step: values for step, values in by_step.items() if len(values) == len(runs)}
        means = [statistics.mean(values) for values in shared.values()]
        over_steps.plot(list(shared), means, color=color, linewidth=1.8)
        top1 = [100 * run.top1 for run in runs]
        at_end.plot(top1, [index] * len(top1), "o", color=color, alpha=0.6)
        at_end.plot([statistics.mean(top1)] * 2, [index - 0.3, index + 0.3], color=color, linewidth=1.8)
    over_steps.set_title("held-out accuracy (%)", fontsize=12)
    over_steps.set_xlabel("step")
    at_end.set_title("at the end: runs and mean (%)", fontsize=12)
    at_end.set_yticks(range(len(rows)), [curves.plain(row) for row in rows])
    at_end.invert_yaxis()
    for axis in (over_steps, at_end):
        axis.grid(alpha=0.3)
    curves.save(figure, output)
