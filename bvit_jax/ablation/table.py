"""The results of a study as a table in Markdown, and in sentences."""

import statistics
from collections.abc import Sequence

from bvit_jax.ablation.comparison import Difference, deviation, difference
from bvit_jax.ablation.runs import Result
from bvit_jax.ablation.study import Study

HEADER = ("row", "top-1, %", "single runs", "held-out loss", "difference", "minutes")


def as_markdown(study: Study, results: Sequence[Result]) -> str:
    """Returns a table with a line for each row, what it says about the rows, and what trained them.

    The difference is in points of top-1, with the half width of its interval.
    """
    pairs = dict(study.pairs())
    lines = [HEADER, ("---",) * len(HEADER)]
    for row in study.rows:
        runs = of_row(results, row)
        if runs:
            other = pairs.get(row, "")
            against = f"{_points(found)}" if other and (found := compare(results, row, other)) else ""
            lines.append((row, *_cells(runs), against, f"{statistics.mean(r.minutes for r in runs):.1f}"))
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    devices = ", ".join(dict.fromkeys(result.device for result in results))
    seeds = len({result.seed for result in results})
    about = f"{seeds} seed{'s' * (seeds != 1)}, trained on {devices}."
    return "\n\n".join((f"### {study.title}", table, "\n".join(findings(study, results)), about))


def findings(study: Study, results: Sequence[Result]) -> list[str]:
    """Returns a sentence for each pair of rows: whether one is clearly better."""
    sentences = []
    for row, other in study.pairs():
        found = compare(results, row, other)
        if found is None:
            continue
        if found.clear:
            word = "better" if found.mean > 0 else "worse"
            sentences.append(f"- {row} is {word} than {other}: {_points(found)} points.")
        else:
            sentences.append(f"- no clear difference between {row} and {other}: {_points(found)} points.")
    return sentences


def of_row(results: Sequence[Result], row: str) -> list[Result]:
    """Returns the results of a row by seed."""
    return sorted((result for result in results if result.row == row), key=lambda result: result.seed)


def compare(results: Sequence[Result], row: str, other: str) -> Difference | None:
    """Compares the seeds that two rows have in common; None if there are none."""
    values, others = ({r.seed: r.top1 for r in of_row(results, name)} for name in (row, other))
    common = sorted(values.keys() & others.keys())
    return difference([values[s] for s in common], [others[s] for s in common]) if common else None


def _cells(runs: Sequence[Result]) -> tuple[str, str, str]:
    top1 = [100 * run.top1 for run in runs]
    spread = deviation(top1)
    mean = f"{statistics.mean(top1):.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
    loss = statistics.mean(run.loss for run in runs)
    return mean, ", ".join(f"{value:.2f}" for value in top1), f"{loss:.3f}"


def _points(found: Difference) -> str:
    width = f" ± {100 * found.half_width:.2f}" if found.half_width != float("inf") else ""
    return f"{100 * found.mean:+.2f}{width}"
