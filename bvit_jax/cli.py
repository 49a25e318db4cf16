"""What the commands share: flags, logging, and one-line errors in place of tracebacks."""

import argparse
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from bvit_jax.errors import UserError
from bvit_jax.runtime import allocator, compilation, distributed
from bvit_jax.runtime.interruption import SIGNAL, Interrupted

GRACE = 2  # seconds
STDERR = 2  # the file descriptor, in which C++ writes too
# What jax and Gloo say where another process is gone.
LOST = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|Gloo|[Cc]onnection|heartbeat|peer")


def run(main: Callable[[list[str]], None], default_config: Path | None = None) -> NoReturn:
    """Parses the flags and runs ``main``; a `UserError` becomes one line and exit status 1.

    Args:
      main: the command, given what is left of the arguments.
      default_config: file that ``--config`` stands for where it is not given. The default of the
        flag itself cannot be used: it is parsed, overrides included, before errors can be caught.
    """
    app.run(_guarded(main), flags_parser=partial(_parse, default_config))


def define_cluster_flags() -> None:
    """Defines the flags that `start_jax` reads."""
    flags.DEFINE_bool(
        "distributed",
        None,
        "Run as one of several processes. By default so where --coordinator is given and on TPU pods;"
        " --distributed alone also finds Slurm, Open MPI and Kubernetes.",
    )
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, the same for all processes.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_integer(
        "startup_timeout", distributed.DEFAULT_TIMEOUT, "Seconds to wait for all processes.", lower_bound=1
    )


def start_jax() -> None:
    """Connects the processes of a run as the flags say, and keeps what they compile.

    Afterwards only the first process logs progress.
    """
    values = flags.FLAGS
    cluster = distributed.Cluster(
        values.coordinator, values.num_processes, values.process_id, values.startup_timeout
    )
    allocator.keep_freed_memory()
    distributed.start(cluster, values.distributed)
    compilation.use_cache()
    if jax.process_index() > 0:
        logging.getLogger("bvit_jax").setLevel(logging.WARNING)


def print_result(line: str) -> None:
    """Writes the result of a command to stdout, once for all processes."""
    if jax.process_index() == 0:
        sys.stdout.write(line + "\n")


def exit_status(action: Callable[[], None]) -> int:
    """Runs a command of one action and returns its exit status, 0 or 1.

    A `UserError` or an error of the file system becomes one line. SIGTERM ends the command as an
    exception does, so that what it has half written is removed.
    """
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        action()
        sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {error.strerror or error}: {error.filename}\n")
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def add_noema(parser: argparse.ArgumentParser) -> None:
    """Adds the flag by which a command takes the raw weights of a run that keeps a moving average."""
    parser.add_argument(
        "--noema",
        dest="ema",
        action="store_false",
        default=None,
        help="of a run with a moving average, the raw weights",
    )


def positive(text: str) -> int:
    """Returns the number above 0 that an argument of a command is."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def no_arguments(argv: Sequence[str]) -> None:
    """Raises `UserError` if words are left that are no flags."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags start with --, see --help")


def required(flag: str, value: str | None) -> str:
    """Returns the value of a flag; raises `UserError` if it is missing."""
    if not value:
        raise UserError(f"--{flag} is missing; pass --{flag}=DIR")
    return value


def loaded_config(value: Any) -> ConfigDict:
    """Returns the value of a config flag; raises `UserError` if its file could not be loaded."""
    return _loaded(value, flags.FLAGS)


def parse_config(arguments: Sequence[str]) -> ConfigDict:
    """Returns the configuration that ``--config=FILE[:ARGUMENT]`` and ``--config.KEY=VALUE`` describe.

    It is for commands whose other arguments are argparse's; the flags mean what they do for train.py.

    Raises:
      UserError: there is no such file, key or value, or another argument.
    """
    values, argv = flags.FlagValues(), ["", *arguments]
    config_flags.DEFINE_config_file(
        "config", None, "Experiment.", lock_config=True, flag_values=values, sys_argv=argv
    )
    no_arguments(_parsed(values, argv))
    if values["config"].value is None:
        raise UserError("--config is missing; pass --config=FILE, a file of configs/")
    return _loaded(values["config"].value, values)


def _loaded(value: Any, values: flags.FlagValues) -> ConfigDict:
    if isinstance(value, ConfigDict):
        return value
    path = config_flags.get_config_filename(values["config"])
    raise UserError(f"--config: cannot load {path}; expected a file of configs/")


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(1)


def _parse(default_config: Path | None, argv: list[str]) -> list[str]:
    given = any(re.match(r"--?config(=|$)", argument) for argument in argv)
    if default_config is not None and not given:
        argv = [argv[0], f"--config={default_config}", *argv[1:]]
    try:
        return _parsed(flags.FLAGS, argv)
    except UserError as error:
        _fail(str(error))


def _parsed(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Parses flags, among them one of a configuration; every mistake in them becomes a `UserError`."""
    try:
        return values(argv)
    except flags.Error as error:
        raise UserError(f"{error}; see --help") from error
    except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        # What ml_collections raises for a wrong key, value or path of --config.
        message = str(error.args[0] if error.args else error)
        kind = "unknown key " if isinstance(error, KeyError | AttributeError) else ""
        message = message.replace("\\n", ". ").replace("\\", "").replace("'", "")
        raise UserError(f"--config: {kind}{message}") from error


def _guarded(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def guarded(argv: list[str]) -> None:
        _start_logging()
        try:
            main(argv)
        except UserError as error:
            _end(f"error: {error}", 1)
        except Interrupted as interrupted:
            _end(str(interrupted), 128 + SIGNAL)
        except KeyboardInterrupt:
            _end("interrupted; run the same command again to continue", 130)
        except Exception as error:
            told = compilation.as_user_error("what the run computes", error)
            if isinstance(told, UserError):
                _end(f"error: {told}", 1)
            if not distributed.is_active():
                raise
            # A step that runs in the thread that calls it raises ValueError.
            if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and LOST.search(str(error)):
                first = str(error).strip().splitlines()[0]
                _end(
                    f"error: the other processes of the run do not answer: {first}; start all of them again",
                    1,
                )
            traceback.print_exc()  # and the others need not wait until jax notices
            _end(f"error: {error}", 1)

    return guarded


def _end(message: str, status: int) -> NoReturn:
    """Ends the process with one line, at once.

    The interpreter's own way would wait for threads that compile and for processes that compute, and
    report what Orbax has left unfinished after a failure. Nothing is written after the line: where
    heartbeats of another process were missed, jax aborts this one meanwhile, with its stack.
    """
    sys.stderr.write(f"{' '.join(message.split())}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)
    for child in multiprocessing.active_children():
        child.terminate()
    if distributed.is_active() and jax.process_index() == 0:
        time.sleep(GRACE)  # the others' connections end with this process, and their own last words
    os._exit(status)


class _StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time: the progress line takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _report_unraisable(event: "sys.UnraisableHookArgs") -> None:
    """Passes over what TensorStore's threads raise, once an array, after Orbax has given up a checkpoint."""
    if str(event.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(event)


def _start_logging() -> None:
    """Sends this package's log to stderr, one line an event."""
    # Orbax and Grain log every call, and each part of a failure that is raised here as one error.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("bvit_jax")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
