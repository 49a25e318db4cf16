"""Compiles programs before their first call."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from bvit_jax.errors import UserError
from bvit_jax.runtime import process

POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


def lower(jitted: Any, *arguments: Any) -> Any:
    """Returns ``jitted.lower(*arguments)``, in a process of ours traced without garbage collection."""
    with process.without_collection():
        return jitted.lower(*arguments)


class Compilation:
    """A lowered function that is being compiled in a thread."""

    def __init__(self, name: str, lowered: Any) -> None:
        """Starts to compile what `lower` returns; ``name`` is for the log."""
        logger.info("compiling %s", name)
        self._name, self._lowered, self._start = name, lowered, time.perf_counter()
        self._thread = threading.Thread(target=self._compile, name="compile", daemon=True)
        self._thread.start()

    def _compile(self) -> None:
        try:
            self._result = self._lowered.compile()
            logger.info("compiled %s in %.1f s", self._name, time.perf_counter() - self._start)
        except Exception as error:  # for the thread that waits
            self._result = error

    def wait(self, stop: Callable[[], bool]) -> Any | None:
        """Waits for the end.

        Args:
          stop: called a few times per second; True gives up.

        Returns:
          The compiled function, or None if ``stop`` returned True; the thread then runs until the process
          ends.

        Raises:
          UserError: the program does not fit into the memory of a device.
        """
        while self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            if stop():
                return None
        if isinstance(self._result, Exception):
            raise as_user_error(self._name, self._result) from self._result
        process.release_memory()
        return self._result


def as_user_error(name: str, error: Exception) -> Exception:
    """Converts an out-of-memory error into a `UserError`; returns other errors unchanged."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"{name} does not fit into the memory of a device: {reason}; lower config.batch_size, or set"
        " config.accumulate_steps, config.remat or config.health=False"
    )
