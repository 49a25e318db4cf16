"""SIGTERM, the notice of a preemption, and how all processes of a run agree to stop."""

from collections.abc import Callable

import jax

from bvit_jax.runtime import process
from bvit_jax.workdir.collectives import preemption_reached


class Interrupted(Exception):
    """The run was asked to stop, and stopped after ``step``, which is saved."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(f"stopped by SIGTERM at step {step}; run the same command again to continue")


class Interruption:
    """Says when a run is to stop.

    With several processes, JAX has a handler of SIGTERM of its own from `jax.distributed.initialize` on, and
    passes a notice to one of them on to all.

    Args:
      sigterm: whether to take SIGTERM until `close`, in the main thread of a run of one process. The command
        does; in a program of one's own, SIGTERM stays what it is unless this asks for it.
    """

    def __init__(self, *, sigterm: bool = False) -> None:
        self._noticed = False
        self._ticks = 0
        self._alone = jax.process_count() == 1
        self._restore: Callable[[], object] | None = None
        if sigterm and self._alone:
            self._restore = process.take_sigterm(self._notice)

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
        if self._restore is not None:
            self._restore()

    def _notice(self) -> None:
        self._noticed = True
