"""What a run has logged: the lines of its ``metrics.jsonl``, and one metric of them."""

import json
import math
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError

Lines = list[dict[str, Any]]


def read_metrics(workdir: Path) -> Lines:
    """Returns the lines of a run's ``metrics.jsonl``; an incomplete last line is skipped.

    Raises:
      UserError: the file is missing or empty, or another line is malformed.
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
                f"{path} is damaged: line {number} is not a JSON object with a step and numbers; delete that"
                " line"
            )
    if not lines:
        raise UserError(f"{path} is empty: the run has not logged anything yet")
    return lines


def series(lines: Lines, metric: str, factor: float = 1) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a metric; values that were not finite are NaN."""
    points = [(line["step"], line[metric]) for line in lines if metric in line]
    values = [
        math.nan if value is None or not math.isfinite(value) else factor * value for _, value in points
    ]
    return [step for step, _ in points], values


def _parsed(row: str) -> dict[str, Any] | None:
    try:
        line = json.loads(row)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    numbers = (value for name, value in line.items() if name != "health")
    return line if all(value is None or type(value) in (int, float) for value in numbers) else None
