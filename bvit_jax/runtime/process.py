"""What changes the whole process, all of it, and happens only where the process is ours.

`take` is called by the console script and by ``python -m``, once, before anything else. Without it, in a
notebook, a test or another program, `bvit_jax.cli.main` and the library set no handlers, change no loggers,
no variables of the environment and no settings of JAX, call no allocator and let the collector run. Two
functions do something elsewhere too, for as long as they are asked to: `take_sigterm` and `environment`.
"""

import contextlib
import gc
import hashlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax
from absl import logging as absl_logging

from bvit_jax.runtime import allocator

GRACE = 2  # seconds
CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
STDERR = 2  # the file descriptor that C++ writes to as well

_ours = False


def is_ours() -> bool:
    """Returns whether `take` was called."""
    return _ours


def take() -> None:
    """Declares that this process runs one command and nothing else."""
    global _ours
    _ours = True
    # Orbax and Grain log every call, and each part of a failure that is raised here as one error.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable


def log_to_stderr() -> None:
    """Sends this package's log to stderr, one line per event."""
    if not _ours:
        return
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("bvit_jax")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def exit_on_sigterm() -> None:
    """Makes SIGTERM raise `SystemExit`, so that a command removes what it has half written."""
    if _ours:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def take_sigterm(notice: Callable[[], None]) -> Callable[[], object]:
    """Calls ``notice`` at SIGTERM, in any process: ask for it only on the caller's behalf.

    Returns:
      What restores the handler from before. In a thread other than the main one nothing can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    previous = signal.signal(signal.SIGTERM, lambda number, frame: notice())
    return lambda: previous is not None and signal.signal(signal.SIGTERM, previous)


def prepare_to_compute() -> None:
    """Keeps freed memory and compiled programs; call it before JAX starts its backend."""
    if _ours:
        allocator.keep_freed_memory()
        _use_cache()


def stay_on_cpu() -> None:
    """Keeps JAX from starting an accelerator; call it before JAX starts its backend."""
    if _ours:
        jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Runs JAX on the CPU; in our own process no accelerator is started."""
    stay_on_cpu()
    if _ours or jax.default_backend() == "cpu":
        yield
    else:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            yield


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment that are not set; takes them back unless the process is ours."""
    added = variables.keys() - os.environ.keys()
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added if not _ours else ():
            os.environ.pop(name, None)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Pauses garbage collection.

    Tracing creates millions of objects that live until it ends, and the collector scans them over and over,
    a third of the time.
    """
    pauses = _ours and gc.isenabled()
    if pauses:
        gc.disable()
    try:
        yield
    finally:
        if pauses:
            gc.enable()


def release_memory() -> None:
    """Returns the memory that compiling has freed to the system."""
    if _ours:
        allocator.release()


def log_warnings_only() -> None:
    """Leaves the progress of a run to its first process."""
    if _ours:
        logging.getLogger("bvit_jax").setLevel(logging.WARNING)


@contextlib.contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with one line and exit status 1 if the block, which waits in C++, lasts longer."""

    def end_at_once() -> None:
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
        os._exit(1)

    watch = threading.Timer(seconds, end_at_once)
    watch.daemon = True
    if _ours:
        watch.start()
    try:
        yield
    finally:
        watch.cancel()


def end(status: int, *, at_once: bool) -> NoReturn:
    """Ends the process.

    Args:
      status: the exit status.
      at_once: without the interpreter's own cleaning up, which would wait for threads that compile and for
        processes that compute, and would report what Orbax has left unfinished after a failure. A run of
        several processes is left in order if all of them end within `GRACE`, for which
        ``jax.distributed.shutdown`` would wait minutes where one of them is gone or goes on. Nothing is
        written afterwards: where another process is missed, JAX aborts this one meanwhile, and would print
        its stack.
    """
    if not at_once:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)
    for child in multiprocessing.active_children():
        child.terminate()
    if jax.distributed.is_initialized():
        # For process 0 this is also the time of the others' last words: their connections end with it.
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(GRACE)
    os._exit(status)


def discard_stdout() -> None:
    """Drops what is still to be written to a pipe that nobody reads."""
    if _ours:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time: the progress line replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _report_unraisable(event: "sys.UnraisableHookArgs") -> None:
    """Ignores what TensorStore's threads raise, once per array, after Orbax has given up a checkpoint."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _use_cache() -> None:
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


def _kind_of_cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "any"
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return hashlib.sha256((flags[1] if flags else "").encode()).hexdigest()[:8]
