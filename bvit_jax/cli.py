"""The command ``bvit``: ``bvit COMMAND --help``.

`main` runs a command and returns its exit status, in any process, as often as wanted. `run` is for a process
of the command's own, which it changes and ends (`bvit_jax.runtime.process`). All commands have one policy for
errors: what is wrong outside the program is one line on stderr, everything else is a bug and keeps its
traceback. JAX is imported by the commands, so that `run` has taken the signals before.
"""

import functools
import importlib
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from absl import flags

from bvit_jax.errors import Interrupted, Stopped, UserError, nearest
from bvit_jax.files import any_path
from bvit_jax.runtime import process
from bvit_jax.runtime.arguments import config_of, parse_with_config

KINDS = ("latest", "best")  # of checkpoints
USAGE = 2  # exit status for a command line that is wrong, as argparse has it


@dataclass(frozen=True)
class Command:
    """A command and how its process behaves.

    Attributes:
      text: what it does, in a line.
      run: takes the arguments; returns an exit status, None for 0, and raises what is wrong.
      logs: whether the package's log goes to stderr.
      trains: whether it may be one process of several, save at signals, and leave threads behind.
    """

    text: str
    run: Callable[[list[str]], int | None]
    logs: bool = False
    trains: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; changes nothing else of the process.

    Args:
      argv: the command and its arguments; those of the process if None.

    Returns:
      0, or 1 after an error that is one line on stderr, 2 for arguments that argparse refuses, 128 + the
      signal that asked it to stop, or what the command documents.
    """
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if name == "--version":
        from bvit_jax import __version__
        from bvit_jax.report.machine import describe

        sys.stdout.write(f"{describe(__version__)}\n")
        return 0
    if name not in COMMANDS:
        return _fail(f"no command {name!r}{nearest(name, COMMANDS)}")
    return _status(functools.partial(_run, COMMANDS[name], arguments))


def run(*argv: str) -> NoReturn:
    """Runs a command in a process of its own, and ends the process.

    Args:
      argv: the command, followed by the process's arguments; the command is among these if not given.
    """
    words = [*argv, *sys.argv[1:]]
    command = COMMANDS.get(words[0]) if words else None
    process.take()
    if command is not None and command.logs:
        process.log_to_stderr()
    status = main(words)
    process.end(status, at_once=status > 128 or (status != 0 and command is not None and command.trains))


def usage() -> str:
    """Returns what ``bvit --help`` prints."""
    lines = [f"  {name:8}  {command.text}" for name, command in COMMANDS.items()]
    end = "bvit COMMAND --help describes one, bvit --version what is installed."
    return "\n".join(["usage: bvit COMMAND ...", "", *lines, "", end, ""])


# --- errors --------------------------------------------------------------------------------------


def _run(command: Command, arguments: list[str]) -> int:
    status = command.run(arguments)
    sys.stdout.flush()
    return status or 0


def _status(action: Callable[[], int]) -> int:
    """Returns the exit status of an action, and writes its error as one line."""
    try:
        return action()
    except SystemExit as end:  # argparse's
        return end.code if isinstance(end.code, int) else 0 if end.code is None else USAGE
    except (Interrupted, Stopped) as stop:
        return _line(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        return _line(str(Stopped()), 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output has seen enough
        process.discard_stdout()
        return 1
    except UserError as error:
        return _fail(str(error))
    except Exception as error:
        signalled = process.stopped()
        if signalled is not None:  # what was called has made another error of it
            return _line(str(signalled), 128 + signalled.number)
        from bvit_jax.runtime import compilation, distributed

        known = compilation.as_user_error("what the run computes", error)
        if isinstance(known, UserError):
            return _fail(str(known))
        if distributed.is_active():  # the other processes must not wait until jax notices
            lost = distributed.lost(error)
            if not lost:
                traceback.print_exc()
            return _fail(lost or str(error))
        if isinstance(error, OSError):
            place = f": {error.filename}" if error.filename is not None else ""
            return _fail(f"{error.strerror or error}{place}")
        raise


def _fail(message: str) -> int:
    return _line(f"error: {message}", 1)


def _line(message: str, status: int) -> int:
    sys.stderr.write(" ".join(message.split()) + "\n")
    return status


# --- train, eval, plan ---------------------------------------------------------------------------


def _train(arguments: list[str]) -> None:
    """Trains a model: bvit train --config=digits --workdir=DIR"""
    values = flags.FlagValues()
    text, boolean = _definers(values)
    text("workdir", None, "Directory of the run, local or gs://BUCKET/RUN. Continues what is there.")
    boolean("dry_run", False, "Build everything, compile it, print its cost as JSON, and stop.")
    boolean("debug_nans", False, "Stop at the first operation that makes a NaN, and name it; slower.")
    boolean(
        "allow_changes", False, "Continue although the model, or what a step means, differs from the run's."
    )
    _define_topology(values, "With --dry_run: ")
    _define_cluster(values)
    if _asks_for_help(arguments, values, _train):
        return
    parse_with_config(values, arguments, default="digits")
    if values.dry_run and values.debug_nans:
        raise UserError("--debug_nans runs the steps that --dry_run leaves out; leave out one of them")
    if values.dry_run:
        _print_plan(values)
        return
    if values.topology:
        raise UserError(f"--topology={values.topology} is for planning only; add --dry_run")
    config, workdir = config_of(values), _workdir(values)
    _start_jax(values)
    from bvit_jax.runtime.interruption import Interruption
    from bvit_jax.training.evaluation import to_json
    from bvit_jax.training.loop import train_and_evaluate

    interruption = Interruption(sigterm=process.is_ours())
    figures = train_and_evaluate(
        config,
        workdir,
        debug_nans=values.debug_nans,
        allow_changes=values.allow_changes,
        interruption=interruption,
    )
    _print_result(to_json(figures))


def _plan(arguments: list[str]) -> None:
    """Compiles a run and prints what it needs: bvit plan --config=digits [--topology=v5e:4x4]"""
    values = flags.FlagValues()
    _define_topology(values)
    _define_cluster(values)
    if not _asks_for_help(arguments, values, _plan):
        parse_with_config(values, arguments, default="digits")
        _print_plan(values)


def _print_plan(values: flags.FlagValues) -> None:
    config = config_of(values)
    if values.topology:
        process.stay_on_cpu()  # the chips of this machine, if any, are left alone
    else:
        _start_jax(values)
    from bvit_jax.plan.dry_run import dry_run, table
    from bvit_jax.training.evaluation import to_json

    figures = dry_run(config, values.topology)
    sys.stderr.write(table(figures) + "\n")
    _print_result(to_json(figures))


def _eval(arguments: list[str]) -> None:
    """Evaluates a checkpoint: bvit eval --workdir=DIR [--checkpoint=best]; the last line is JSON.

    A converted model is evaluated on an experiment's data set: bvit eval --checkpoint=MODEL --config=NAME
    """
    from bvit_jax.weights.class_names import Matching

    values = flags.FlagValues()
    text, boolean = _definers(values)
    text("workdir", None, "Workdir that bvit train wrote, local or gs://BUCKET/RUN.")
    text("checkpoint", "latest", "latest or best (by top-1) of a workdir; with --config, a converted model.")
    boolean(
        "ema", None, "The moving average; by default where the run keeps one, --noema for the raw weights."
    )
    text("data_dir", None, "Data directory in place of the run's.")
    text("split", None, "Split in place of the run's evaluation split.")
    flags.DEFINE_integer("batch_size", None, "Global batch in place of the run's.", flag_values=values)
    flags.DEFINE_enum(
        "classes",
        "same",
        get_args(Matching),
        "The model's classes that the data set has: the same; a subset, by name; those whose numbers its"
        " names are; or as many, in their order, whatever their names.",
        flag_values=values,
    )
    _define_cluster(values)
    if _asks_for_help(arguments, values, _eval):
        return
    parse_with_config(values, arguments)
    overrides = {
        "data.data_dir": values.data_dir,
        "data.eval_split": values.split,
        "eval_batch_size": values.batch_size,
    }
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if values["config"].value is not None:
        _eval_model(values, overrides)
        return
    if values.checkpoint not in KINDS:
        raise UserError(
            f"--checkpoint is {values.checkpoint!r}; expected latest or best, or --config for its data set"
        )
    workdir = _workdir(values)
    _start_jax(values)
    process.raise_at_signals()  # again: JAX takes SIGTERM where it starts several processes
    from bvit_jax.training.evaluation import evaluate_workdir, to_json

    _print_result(
        to_json(evaluate_workdir(workdir, values.checkpoint, overrides, values.ema, values.classes))
    )


def _eval_model(values: flags.FlagValues, overrides: Mapping[str, Any]) -> None:
    config = config_of(values)
    config.update_from_flattened_dict(overrides)
    if values.workdir or values.ema is not None or values.checkpoint in KINDS:
        raise UserError("with --config, name a model with --checkpoint, without --workdir and --ema")
    path = any_path(values.checkpoint)
    _start_jax(values)
    process.raise_at_signals()
    from bvit_jax.inference.evaluation import evaluate_model
    from bvit_jax.training.evaluation import to_json

    _print_result(to_json(evaluate_model(path, config, values.classes)))


def _definers(values: flags.FlagValues) -> tuple[Any, Any]:
    """Returns what defines a text and a boolean among the flags of one command."""
    return (
        functools.partial(flags.DEFINE_string, flag_values=values),
        functools.partial(flags.DEFINE_bool, flag_values=values),
    )


def _define_topology(values: flags.FlagValues, condition: str = "") -> None:
    text = "Chips to compile for, such as v5e:16x16 or h100, in place of the devices that are here."
    flags.DEFINE_string("topology", "", condition + text, flag_values=values)


def _define_cluster(values: flags.FlagValues) -> None:
    """Defines the flags that `_start_jax` reads."""
    from bvit_jax.runtime.distributed import DEFAULT_TIMEOUT

    text, boolean = _definers(values)
    number = functools.partial(flags.DEFINE_integer, flag_values=values)
    boolean(
        "distributed",
        None,
        "Run as one of several processes. The default where --coordinator is given and on TPU pods;"
        " --distributed alone also finds Slurm, Open MPI and Kubernetes.",
    )
    text("coordinator", "", "HOST:PORT of process 0, the same for all processes.")
    number("num_processes", None, "Number of processes.")
    number("process_id", None, "Number of this process, from 0.")
    number("startup_timeout", DEFAULT_TIMEOUT, "Seconds to wait for all processes.", lower_bound=1)


def _start_jax(values: flags.FlagValues) -> None:
    """Connects the processes of a run as the flags say; afterwards only the first one logs progress."""
    import jax

    from bvit_jax.runtime import distributed

    cluster = distributed.Cluster(
        values.coordinator, values.num_processes, values.process_id, values.startup_timeout
    )
    process.prepare_to_compute()
    distributed.start(cluster, values.distributed)
    if jax.process_index() > 0:
        process.log_warnings_only()


def _asks_for_help(arguments: Sequence[str], values: flags.FlagValues, command: Callable[..., Any]) -> bool:
    asked = not {"-h", "-help", "--help"}.isdisjoint(arguments)
    if asked:
        sys.stdout.write(f"{command.__doc__}\n\n{values.get_help(include_special_flags=False)}\n")
    return asked


def _workdir(values: flags.FlagValues) -> Path:
    if not values.workdir:
        raise UserError("--workdir is missing; pass --workdir=DIR")
    return any_path(values.workdir)


def _print_result(line: str) -> None:
    """Writes the result of a command to stdout, once for all processes."""
    import jax

    if jax.process_index() == 0:
        sys.stdout.write(line + "\n")


# --- the others ----------------------------------------------------------------------------------


def _of(module: str) -> Callable[[list[str]], int | None]:
    """Returns the command ``run`` of a module that is imported when it is needed."""

    def imported(arguments: list[str]) -> int | None:
        return importlib.import_module(module).run(arguments)

    return imported


COMMANDS = {
    "train": Command("train a model, or continue a run", _train, logs=True, trains=True),
    "eval": Command("evaluate a checkpoint of a run", _eval, logs=True, trains=True),
    "plan": Command(
        "compile a run and print what it needs, also for TPUs that are not there",
        _plan,
        logs=True,
        trains=True,
    ),
    "predict": Command("classify image files", _of("bvit_jax.inference.command")),
    "export": Command(
        "fold a model of one bit into a packed file, which the engine runs", _of("bvit_jax.inference.packing")
    ),
    "convert": Command("move weights between PyTorch and JAX", _of("bvit_jax.convert")),
    "prepare": Command("prepare data sets for training", _of("bvit_jax.data.prepare.command"), logs=True),
    "report": Command("pictures and tables of runs, networks and costs", _of("bvit_jax.report.command")),
    "ablate": Command(
        "train the runs of a study and compare them", _of("bvit_jax.ablation.command"), logs=True, trains=True
    ),
    "parity": Command("compare numbers with PyTorch's", _of("bvit_jax.parity.command")),
}

if __name__ == "__main__":
    run()
