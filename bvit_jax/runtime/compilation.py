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


def compile_ahead(name: str, lowered: Any, stop: Callable[[], bool]) -> Any | None:
    """Compiles a lowered function in a thread.

    Args:
      name: for the log.
      lowered: what `lower` returns.
      stop: called a few times per second; True gives up.

    Returns:
      The compiled function, or None if ``stop`` returned True; the thread then runs until the process ends.

    Raises:
      UserError: the program does not fit into the memory of a device.
    """
    logger.info("compiling %s", name)
    start = time.perf_counter()
    results: list[Any] = []

    def compile_it() -> None:
        try:
            results.append(lowered.compile())
        except Exception as error:  # for the thread that waits
            results.append(error)

    thread = threading.Thread(target=compile_it, name="compile", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if stop():
            return None
    (result,) = results
    if isinstance(result, Exception):
        raise as_user_error(name, result) from result
    process.release_memory()
    logger.info("compiled %s in %.1f s", name, time.perf_counter() - start)
    return result


def as_user_error(name: str, error: Exception) -> Exception:
    """Converts an out-of-memory error into a `UserError`; returns other errors unchanged."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"{name} does not fit into the memory of a device: {reason}; lower config.batch_size, or set"
        " config.accumulate_steps, config.remat or config.health=False"
    )
