"""TensorBoard's file of a run, written by the thread that calls: what fails is an error there."""

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


class Board:
    """Appends to a file below a directory where tensorboardX is installed; else every call does nothing.

    metrics.jsonl is the record of a run, which need not fail for this: after an error, which is logged, the
    file is left alone.

    Args:
      directory: is made by the first call that writes.
      purge_step: TensorBoard hides what earlier files hold from this step on; None for none.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        self._directory, self._purge_step = directory, purge_step
        self._file: Any = None  # opened by the first write; False where it cannot be

    def add(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        """Writes scalars and pictures, uint8 (height, width, 3), of a step."""
        if self._file is False:
            return
        try:
            from tensorboardX import summary  # here, because importing it takes a second
            from tensorboardX.proto.event_pb2 import Event

            if self._file is None:
                self._file = _opened(self._directory, self._purge_step)
            parts = [summary.scalar(name, float(value)) for name, value in scalars.items()]
            parts += [summary.image(name, grid, dataformats="HWC") for name, grid in pictures.items()]
            for part in parts:
                self._file.write_event(Event(step=step, wall_time=time.time(), summary=part))
            self._file.flush()
        except ImportError:
            self._file = False
        except Exception as error:  # of a bucket, Google's own
            reason = getattr(error, "strerror", None) or error
            logger.warning("TensorBoard's file is not written any longer: %s", reason)
            self.close()

    def close(self) -> None:
        """Writes nothing more."""
        if self._file:
            with contextlib.suppress(Exception):  # of what is still in its buffer
                self._file.close()
        self._file = False


def _opened(directory: Path, purge_step: int | None) -> Any:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    directory.mkdir(exist_ok=True)
    file = EventsWriter(str(directory / "events"))
    if purge_step is not None:
        file.write_event(Event(step=purge_step, file_version="brain.Event:2"))
        file.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
    return file
