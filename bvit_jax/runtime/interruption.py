"""SIGTERM, the notice of a preemption, and how all processes of a run agree to stop."""

import signal
import threading
from types import FrameType
from typing import Any

import jax

from bvit_jax.workdir.collectives import preemption_reached

SIGNAL = signal.SIGTERM


class Interrupted(Exception):
    """The run was asked to stop, and stopped after ``step``, which is saved."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(f"stopped by {SIGNAL.name} at step {step}; run the same command again to continue")


class Interruption:
    """Watches for SIGTERM from its creation until `close`.

    With several processes, JAX's preemption service passes a notice to one of them on to all.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._ticks = 0
        self._previous: Any = None
        self._alone = jax.process_count() == 1
        # With several processes jax has a handler of its own, which must stay.
        if self._alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(SIGNAL, self._notice)

    @property
    def noticed(self) -> bool:
        """Whether this process has received a notice; the others may not know yet, see `reached`."""
        return self._noticed

    def reached(self) -> bool:
        """Returns whether to stop here, the same in all processes.

        All processes must call it equally often: at every step and at every evaluation batch.
        """
        self._ticks += 1
        return self._noticed or (not self._alone and preemption_reached(self._ticks))

    def close(self) -> None:
        """Restores the signal handler from before."""
        if self._previous is not None:
            signal.signal(SIGNAL, self._previous)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True
