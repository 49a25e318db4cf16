"""Traces of chosen steps with JAX's profiler."""

import tempfile
from pathlib import Path
from typing import Any

import jax

from bvit_jax.errors import UserError
from bvit_jax.files import copy_into, in_bucket


class Profile:
    """Traces a range of the steps of this process into ``profile`` of the run's directory.

    Steps are counted from 1 with the first one that `before` sees, so that a run which continues is
    traced as well. The device is waited for at both ends: the trace holds these steps, and all of them.
    Every process of a run writes its own files.

    Args:
      workdir: the run's directory.
      steps: the first step and the one after the last, or () for no trace.
    """

    def __init__(self, workdir: Path, steps: tuple[int, ...] = ()) -> None:
        self.directory = workdir / "profile"
        self._range = range(*steps) if steps else range(0)
        self._offset: int | None = None  # steps of the run before this process
        self._metrics: Any = None
        self._tracing = False
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def before(self, step: int) -> None:
        """Starts the trace if it begins with this step; call it ahead of every step.

        Raises:
          UserError: the directory cannot be made.
        """
        if self._offset is None:
            self._offset = step - 1
        if self._range and step - self._offset == self._range[0]:
            try:
                if in_bucket(self.directory):  # to be copied there
                    self._scratch = tempfile.TemporaryDirectory()
                else:
                    self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot create {self.directory}: {error.strerror}; make room or set"
                    " config.profile_steps=()"
                ) from error
            jax.block_until_ready(self._metrics)
            jax.profiler.start_trace(self._scratch.name if self._scratch else self.directory)
            self._tracing = True

    def after(self, step: int, metrics: Any) -> None:
        """Ends the trace if this step is its last; call it with what the step returned and is kept."""
        if self._offset is None or not self._range or step - self._offset > self._range[-1]:
            return
        self._metrics = metrics
        if step - self._offset == self._range[-1]:
            self.close()

    def close(self) -> None:
        """Ends a trace whose last step was not reached."""
        if self._tracing:
            jax.block_until_ready(self._metrics)
            self._tracing = False
            jax.profiler.stop_trace()
            if self._scratch:
                copy_into(Path(self._scratch.name), self.directory)
                self._scratch.cleanup()
        self._metrics = None
