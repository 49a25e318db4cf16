"""What changes the whole process, all of it, and happens only where the process is ours.

`take` is called by the console script and by ``python -m``, once, before anything else; the console script
only gives Ctrl-C its default before, while it imports. Without `take`, in a notebook, a test or another
program, `bvit_jax.cli.main` and the library set no handlers, change no loggers, no variables of the
environment and no settings of JAX, call no allocator and let the collector run. Two functions do something
elsewhere too, for as long as they are asked to: `take_signals` and `environment`.

JAX is imported only where it is used, so that signals are ours while it is.
"""

import contextlib
import ctypes
import gc
import io
import itertools
import logging
import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn, TypeVar

from absl import logging as absl_logging

from bvit_jax.errors import Stopped
from bvit_jax.runtime.cache import cache_directory

T = TypeVar("T")
GRACE = 2  # seconds
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a preemption, a terminal that is closed
PATIENCE = 10  # seconds that Python may need to see a signal: it does not while C++ computes
CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
STDERR = 2  # the file descriptor that C++ writes to as well
HEAD = re.compile(rb"[IWEF]\d{4} ")  # of a message of C++


_ours = False
_stderr = STDERR  # where our own lines go
_on_abort: Any = None
_stopped: Stopped | None = None  # what a signal has raised
_ending: int | None = None  # the exit status of `end`, once it runs
_seen = threading.Event()  # that a signal has come; Python's handler has run
_again = threading.Event()  # the next signal is one that comes a second time because it was swallowed


def is_ours() -> bool:
    """Returns whether `take` was called."""
    return _ours


def stopped() -> Stopped | None:
    """Returns what a signal has raised, also where other code made another exception of it."""
    return _stopped


def take() -> None:
    """Declares that this process runs one command and nothing else."""
    global _ours
    _ours = True
    threading.Thread(target=_watch, args=(_pipe_of_signals(),), name="signals", daemon=True).start()
    raise_at_signals()
    sys.unraisablehook = _report_unraisable
    # Orbax and Grain log every call, and each part of a failure that is raised here as one error.
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_logger().addFilter(lambda record: record.levelno == logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # It frees the shared memory of Grain's workers after they are ended, and warns of it.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    warnings.filterwarnings("ignore", module="PIL")  # about broken EXIF data; what matters is an error
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal's encoding does not have
        sys.stdout.reconfigure(errors="backslashreplace")


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


def raise_at_signals() -> None:
    """Makes each of `STOPS` raise `Stopped`, so that a command removes what it has half written.

    Those that the process was started to ignore, as by nohup, stay ignored. A second Ctrl-C ends it at once.
    """
    if _ours:
        take_signals(_raise)


def take_signals(notice: Callable[[int], None], *, as_sigterm: bool = False) -> Callable[[], object]:
    """Calls ``notice`` at each of `STOPS`, or at SIGTERM alone in a process that is not ours.

    Args:
      notice: called in the main thread with the number of the signal.
      as_sigterm: leave SIGTERM to JAX, which informs all processes of a run, and turn the others into it.

    Returns:
      What restores the handlers from before. In a thread other than the main one nothing can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handle(number: int, frame: object) -> None:
        _seen.set()
        notice(number)
        if as_sigterm:
            signal.raise_signal(signal.SIGTERM)

    numbers = [
        n for n in STOPS if (_ours or n == signal.SIGTERM) and not (as_sigterm and n == signal.SIGTERM)
    ]
    taken = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in taken}
    return lambda: [signal.signal(*pair) for pair in previous.items() if pair[1] is not None]


def leave_ctrl_c_to_us(elements: Iterable[T]) -> Iterator[T]:
    """Yields the elements; the processes that the first one starts do not hear the terminal's Ctrl-C."""
    iterator = iter(elements)
    if _ours:
        resource_tracker.ensure_running()  # when it starts, it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT} if _ours else ())
    try:
        first = list(itertools.islice(iterator, 1))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from itertools.chain(first, iterator)


def prepare_to_compute() -> None:
    """Keeps freed memory and compiled programs; call it before JAX starts its backend."""
    if _ours:
        from bvit_jax.runtime import allocator

        allocator.keep_freed_memory()
        _use_cache()


def stay_on_cpu() -> None:
    """Keeps JAX from starting an accelerator; call it before JAX starts its backend."""
    if _ours:
        import jax

        jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Runs JAX on the CPU; in our own process no accelerator is started."""
    import jax

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
        from bvit_jax.runtime import allocator

        allocator.release()


def log_warnings_only() -> None:
    """Leaves the progress of a run to its first process."""
    if _ours:
        logging.getLogger("bvit_jax").setLevel(logging.WARNING)


@contextlib.contextmanager
def watched(watch: Callable[[threading.Event], str]) -> Iterator[None]:
    """Ends the process with status 1 if ``watch`` returns a message while the block waits in C++.

    It is called in a thread, with an event that is set at the end of the block.
    """
    done = threading.Event()

    def run() -> None:
        message = watch(done)
        if message and not done.is_set():
            _end_with(f"error: {message}", 1)

    if _ours:
        threading.Thread(target=run, name="watch", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def answer_aborts(explain: Callable[[str], str], unshown: re.Pattern[bytes]) -> None:
    """Ends the process with one line and status 1 where C++ code aborts it for a reason that is known.

    Args:
      explain: returns the message for what C++ has written to stderr, or "" if the abort is to go on.
      unshown: found in the heads of messages that are not passed on to stderr.
    """
    global _stderr, _on_abort
    if not _ours or _on_abort is not None:
        return
    said = bytearray()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    _stderr = os.dup(STDERR)
    os.dup2(writer, STDERR)
    sys.stderr = os.fdopen(_stderr, "w", buffering=1, errors="backslashreplace", closefd=False)

    def read() -> bytes:
        text = b""
        with contextlib.suppress(BlockingIOError):
            text = os.read(reader, 1 << 16)
        said.extend(text)
        return text

    def forward() -> None:
        rest, hidden = b"", False
        while select.select([reader], [], []):
            *lines, rest = (rest + read()).split(b"\n")
            for line in lines:
                if HEAD.match(line):
                    hidden = unshown.search(line) is not None
                if not hidden:
                    os.write(_stderr, line + b"\n")

    def aborted(number: int) -> None:
        if _ending is not None:  # the error has been reported
            os._exit(_ending)
        read()
        message = explain(said.decode(errors="replace"))
        if message:
            _end_with(f"error: {message}", 1)
        os.write(_stderr, said)  # and the abort goes on

    threading.Thread(target=forward, name="stderr", daemon=True).start()
    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


def end(status: int, *, at_once: bool) -> NoReturn:
    """Ends the process.

    Args:
      status: the exit status.
      at_once: without the interpreter's own cleaning up, which would wait for threads that compile and for
        processes that compute, and would report what Orbax has left unfinished after a failure. A run of
        several processes is left in order if all of them end within `GRACE`, for which
        ``jax.distributed.shutdown`` would wait minutes where one of them is gone or goes on. JAX may abort
        the process meanwhile; nothing is written then.
    """
    global _ending
    if not at_once:
        sys.exit(status)
    _ending = status
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)
    for child in multiprocessing.active_children():
        child.terminate()
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
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


def _raise(number: int) -> None:
    """Raises `Stopped`, but in an import, which may be of C++ that dies of it, ends the process at once."""
    global _stopped
    _stopped = Stopped(number)
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            _end_with(str(_stopped), 128 + number)
        frame = frame.f_back
    raise _stopped


def _report_unraisable(event: "sys.UnraisableHookArgs") -> None:
    """Repeats a signal whose exception was swallowed, as in JAX's callback of the garbage collector.

    Ignores what TensorStore's threads raise, once per array, after Orbax has given up a checkpoint.
    """
    if isinstance(event.exc_value, Stopped):
        _again.set()
        _after(0.02, signal.raise_signal, event.exc_value.number)
    elif str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _pipe_of_signals() -> int:
    """Returns a file descriptor from which the number of each signal can be read, whatever computes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _watch(reader: int) -> None:
    """Ends the process at the second Ctrl-C, and where Python's handler does not run in time."""
    pressed = 0
    while True:
        number = os.read(reader, 1)[0]
        if number not in STOPS or _again.is_set():
            _again.clear()
            continue
        pressed += number == signal.SIGINT
        if pressed > 1:
            _end_with(str(Stopped(number)), 128 + number)
        _after(PATIENCE, lambda n: None if _seen.is_set() else _end_with(str(Stopped(n)), 128 + n), number)


def _after(seconds: float, action: Callable[..., object], *arguments: object) -> threading.Timer:
    timer = threading.Timer(seconds, action, arguments)
    timer.daemon = True
    timer.start()
    return timer


def _end_with(line: str, status: int) -> None:
    """Ends the process at once, from any thread, with a line on stderr."""
    show_cursor = "\x1b[?25h" if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""
    os.write(_stderr, f"{show_cursor}{line}\n".encode())
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


def _use_cache() -> None:
    """Keeps compiled programs where `cache_directory` says, or where the environment says."""
    import jax

    if CACHE_VARIABLE in os.environ:
        if not os.environ[CACHE_VARIABLE]:
            jax.config.update("jax_enable_compilation_cache", False)
    elif directory := cache_directory():
        jax.config.update("jax_compilation_cache_dir", str(directory))
