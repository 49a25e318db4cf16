"""Compiles programs before their first call, and keeps them in a cache."""

import ctypes
import gc
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bvit_jax.errors import UserError

POLL_SECONDS = 0.2
CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"

logger = logging.getLogger(__name__)


def use_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless the environment names another.

    ``JAX_COMPILATION_CACHE_DIR`` moves it, and switches it off where it is empty. Programs for CPUs
    hold instructions of the CPU they were compiled on, so that each kind has a directory of its own.
    """
    if CACHE_VARIABLE in os.environ:
        if not os.environ[CACHE_VARIABLE]:
            jax.config.update("jax_enable_compilation_cache", False)
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "bvit_jax" / _kind_of_cpu()))


def lower(jitted: Any, *arguments: Any) -> Any:
    """Returns ``jitted.lower(*arguments)``, traced without garbage collection.

    Tracing creates millions of objects that live until it ends, and the collector scans them over and over,
    a third of the time. The collector's state is restored afterwards.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return jitted.lower(*arguments)
    finally:
        if collects:
            gc.enable()


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
    release_memory()
    logger.info("compiled %s in %.1f s", name, time.perf_counter() - start)
    return result


def release_memory() -> None:
    """Returns freed memory to the system if the C library can: compiling leaves gigabytes behind.

    The free blocks are scattered: the arrays of a step would not fit into them, but the system can reuse
    the pages.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def as_user_error(name: str, error: Exception) -> Exception:
    """Converts an out-of-memory error into a `UserError`; returns other errors unchanged."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"{name} does not fit into the memory of a device: {reason}; lower config.batch_size, or set"
        " config.accumulate_steps, config.remat or config.health=False"
    )


def _kind_of_cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "any"
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return hashlib.sha256((flags[1] if flags else "").encode()).hexdigest()[:8]
