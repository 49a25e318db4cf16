"""Compiles programs before their first call."""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from bvit_jax.errors import UserError
from bvit_jax.runtime import process

POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)


def lower(jitted: Any, *arguments: Any) -> Any:
    """Returns ``jitted.lower(*arguments)``, in a process of ours traced without garbage collection."""
    with process.without_collection():
        return jitted.lower(*arguments)


def compile_all(
    programs: Iterable[tuple[str, Any]], stop: Callable[[], bool], *, threads: int
) -> list[Any] | None:
    """Compiles functions in threads, the next ones being lowered meanwhile.

    After an error or a stop, what waits is dropped. What XLA compiles at that moment cannot be interrupted:
    it goes on in its thread, for which the interpreter waits at its end.

    Args:
      programs: names for the log, and what `lower` returns.
      stop: called after each, and a few times per second; True gives up.
      threads: how many functions are compiled at the same time.

    Returns:
      The compiled functions in the order of ``programs``, or None if ``stop`` returned True.

    Raises:
      UserError: a program does not fit into the memory of a device.
    """
    pool = ThreadPoolExecutor(threads, "compile")
    futures: list[Future[Any]] = []
    waiting: dict[Future[Any], str] = {}
    try:
        for name, lowered in programs:
            logger.info("compiling %s", name)
            futures.append(pool.submit(_compile, lowered))
            waiting[futures[-1]] = name
            _collect(waiting, 0)
            if stop():
                return None
        while waiting:
            _collect(waiting, POLL_SECONDS)
            if stop():
                return None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [future.result()[0] for future in futures]


def _compile(lowered: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def _collect(waiting: dict[Future[Any], str], seconds: float) -> None:
    """Waits for one compilation or more, and removes those that have ended; raises the error of one."""
    for future in wait(waiting, seconds, FIRST_COMPLETED).done:
        name = waiting.pop(future)
        error = future.exception()
        if error is not None:
            raise as_user_error(name, error) from error
        logger.info("compiled %s in %.1f s", name, future.result()[1])
        process.release_memory()


def as_user_error(name: str, error: BaseException) -> BaseException:
    """Converts an out-of-memory error into a `UserError`; returns other errors unchanged."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"{name} does not fit into the memory of a device: {reason}; lower config.batch_size, or set"
        " config.accumulate_steps, config.remat or config.health=False"
    )
