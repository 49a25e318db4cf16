"""Speed and time left of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Speed and time left, without the time spent in evaluation and saving."""

    def __init__(self, step: int, batch_size: int) -> None:
        self._batch_size = batch_size
        self._step, self._start, self._waited = step, time.perf_counter(), 0.0

    def lap(self, step: int, total: int, waited: float) -> dict[str, float]:
        """Returns what happened since the last lap.

        Args:
          step: the last one done.
          total: number of steps.
          waited: seconds spent waiting for data since the start.

        Returns:
          Images per second, the seconds left at that speed, and the share of the time that was spent
          waiting for data.
        """
        now = time.perf_counter()
        seconds = now - self._start
        seconds_per_step = seconds / (step - self._step)
        share = (waited - self._waited) / seconds
        self._step, self._start, self._waited = step, now, waited
        return {
            "images_per_second": self._batch_size / seconds_per_step,
            "seconds_left": (total - step) * seconds_per_step,
            "data_wait": share,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the duration of the context out of the current lap."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start
