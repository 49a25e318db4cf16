"""SIGTERM, the notice of a preemption, Ctrl-C, SIGHUP, and how all processes of a run agree to stop."""

import signal
from collections.abc import Callable

import jax

from bvit_jax.errors import Interrupted
from bvit_jax.runtime import process
from bvit_jax.workdir.collectives import preemption_reached

__all__ = ["Interrupted", "Interruption"]


class Interruption:
    """Says when a run is to stop.

    With several processes, JAX has a handler of SIGTERM of its own from `jax.distributed.initialize` on, and
    passes a notice to one of them on to all; other signals are turned into that one.

    Args:
      sigterm: whether to take SIGTERM from `begin` to `close`, in the main thread; in a process of one's own
        also SIGINT and SIGHUP. The command does; in a program of someone else's, SIGTERM stays what it is
        unless this asks for it.
    """

    def __init__(self, *, sigterm: bool = False) -> None:
        self._noticed = False
        self._number: int = signal.SIGTERM
        self._ticks = 0
        self._alone = jax.process_count() == 1
        self._sigterm = sigterm
        self._restore: Callable[[], object] | None = None

    @property
    def noticed(self) -> bool:
        """Whether this process has received a notice; the others may not know yet, see `reached`."""
        return self._noticed

    def begin(self) -> None:
        """Takes the signals: from here on there is something to save."""
        if self._sigterm:
            self._restore = process.take_signals(self._notice, as_sigterm=not self._alone)

    def reached(self) -> bool:
        """Returns whether to stop here, the same in all processes.

        All processes must call it equally often: at every step and at every evaluation batch.
        """
        self._ticks += 1
        return self._noticed or (not self._alone and preemption_reached(self._ticks))

    def at(self, step: int) -> Interrupted:
        """Returns the error of a run that has stopped after a step."""
        return Interrupted(step, self._number)

    def close(self) -> None:
        """Restores the signal handlers from before."""
        if self._restore is not None:
            self._restore()

    def _notice(self, number: int) -> None:
        self._noticed, self._number = self._alone, number
