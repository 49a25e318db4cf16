"""What runs with several seeds say about a row, and about the difference of two rows."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean difference of two rows, seed by seed, and its interval, by Student's t.

    Attributes:
      mean: of the differences.
      half_width: of the interval that holds the mean of many seeds with a confidence of 95 %; infinite for
        one seed.
    """

    mean: float
    half_width: float

    @property
    def clear(self) -> bool:
        """Returns whether the interval leaves out 0."""
        return abs(self.mean) > self.half_width


def deviation(values: Sequence[float]) -> float | None:
    """Returns the standard deviation of single runs, None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Compares two rows; the runs at one place have the same seed.

    The differences are paired, because runs of one seed see the same images in the same order. The interval
    is about seeds: other held-out images would be another source of chance.
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return Difference(mean, float("inf"))
    factor = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Difference(mean, factor * statistics.stdev(differences) / count**0.5)
