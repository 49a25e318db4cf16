"""What changes the whole process, and happens only where the process is ours.

`take` is called by the console script and by ``python -m``, once, before anything else. Without it, in a
notebook, a test or another program, every function here leaves the process as it is: `bvit_jax.cli.main` and
the library then set no handlers, change no loggers and call no allocator.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
from absl import flags
from absl import logging as absl_logging

from bvit_jax.runtime import allocator, compilation, distributed

GRACE = 2  # seconds
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
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read flags that it defines itself


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


def prepare_to_compute() -> None:
    """Keeps freed memory and compiled programs; call it before JAX starts its backend."""
    if _ours:
        allocator.keep_freed_memory()
        compilation.use_cache()


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Runs JAX on the CPU; in our own process no accelerator is started."""
    if _ours:
        jax.config.update("jax_platforms", "cpu")
    if _ours or jax.default_backend() == "cpu":
        yield
    else:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            yield


def log_warnings_only() -> None:
    """Leaves the progress of a run to its first process."""
    if _ours:
        logging.getLogger("bvit_jax").setLevel(logging.WARNING)


def end(status: int, *, at_once: bool) -> NoReturn:
    """Ends the process.

    Args:
      status: the exit status.
      at_once: without the interpreter's own cleaning up, which would wait for threads that compile and for
        processes that compute, and would report what Orbax has left unfinished after a failure. In a run of
        several processes it would also wait for the others in ``jax.distributed.shutdown``, minutes where
        one of them is gone or goes on. Nothing is written afterwards: where heartbeats of another process
        were missed, JAX aborts this one meanwhile, and would print its stack.
    """
    if not at_once:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)
    for child in multiprocessing.active_children():
        child.terminate()
    if distributed.is_active() and jax.process_index() == 0:
        time.sleep(GRACE)  # the others' connections end with this process, and they have last words too
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
