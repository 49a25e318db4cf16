"""Progress of a command that counts: a bar on a terminal, elsewhere a line in the log every 30 seconds."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

LOG_SECONDS = 30.0

logger = logging.getLogger(__name__)


class ProgressBar:
    """Counts to ``total``; as a context manager it is closed before an error is printed.

    Args:
      title: what is being done, in a word or two.
      total: number of steps.
      done: number of steps done by an earlier run.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._first, self._done = title, total, done, done
        self._started = self._logged = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "ProgressBar":
        if sys.stderr.isatty():
            self._bar = Progress(
                SpinnerColumn("line"),  # something happens, also during a long step
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=4,
                redirect_stdout=False,
            )
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done)
            self._bar.start()
        return self

    def advance(self, steps: int = 1) -> None:
        """Adds ``steps``."""
        self._done += steps
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            left = (self._total - self._done) * (now - self._started) / max(self._done - self._first, 1)
            share = self._done / max(self._total, 1)
            logger.info(
                "%s: %s of %s (%.1f%%), %.0f minutes left",
                self._title,
                f"{self._done:,}",
                f"{self._total:,}",
                100 * share,
                left / 60,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error is None:
            logger.info("%s: %s done", self._title, f"{self._done:,}")
