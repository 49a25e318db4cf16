"""Arguments that several commands take, and the configuration that ``--config`` describes."""

import argparse
import ast
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bvit_jax.errors import UserError, nearest

CONFIGS = Path(__file__).parents[1] / "configs"  # the experiments, part of the package
CONFIG_HELP = (
    "Experiment: the name of one in configs/, such as digits, or a file like them, with an argument after a"
    " colon where it takes one. --config.KEY=VALUE changes a setting."
)


def add_noema(parser: argparse.ArgumentParser) -> None:
    """Adds the flag by which a command takes the raw weights of a run that keeps a moving average."""
    parser.add_argument(
        "--noema",
        dest="ema",
        action="store_false",
        default=None,
        help="the raw weights of a run that keeps a moving average",
    )


def positive(text: str) -> int:
    """Returns the integer above 0 that an argument of a command is."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def setting(text: str) -> tuple[str, Any]:
    """Returns key and value of the argument ``KEY=VALUE``; what is no Python literal is a text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def add_set(parser: argparse.ArgumentParser, text: str, value: Callable[[str], Any] = setting) -> None:
    """Adds the option ``--set``, which may be repeated; ``text`` says what it sets."""
    parser.add_argument(
        "--set", type=value, action="append", default=[], metavar="KEY=VALUE", help=f"{text}; repeatable"
    )


def parse_config(arguments: Sequence[str]) -> ConfigDict:
    """Returns the configuration that ``--config=NAME[:ARGUMENT]`` and ``--config.KEY=VALUE`` describe.

    For commands whose other arguments are argparse's; the flags mean what they do for ``bvit train``.

    Raises:
      UserError: there is no such experiment, key or value, or there is another argument.
    """
    values = flags.FlagValues()
    parse_with_config(values, arguments)
    return config_of(values)


def parse_with_config(values: flags.FlagValues, arguments: Sequence[str], default: str | None = None) -> None:
    """Parses flags, to which ``--config`` is added; `config_of` returns the configuration.

    Args:
      values: the flags of a command; receives their values.
      arguments: of the command, without its name.
      default: experiment to take where ``--config`` is not given. The flag's own default cannot be used: it
        is loaded, overrides included, before errors can be caught.

    Raises:
      UserError: a flag or a value is wrong, or there is an argument that is no flag.
    """
    given = any(re.match(r"--?config(=|$)", argument) for argument in arguments)
    if default is not None and not given:
        arguments = [f"--config={default}", *arguments]
    arguments = _with_config_files(arguments)
    config_flags.DEFINE_config_file(
        "config", None, CONFIG_HELP, lock_config=True, flag_values=values, sys_argv=["", *arguments]
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)  # of ml_collections
            parse_flags(values, arguments)
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError, OSError) as error:
        # What ml_collections raises for a wrong key, value or path of --config.
        message = str(error.args[0] if error.args else error)
        kind = "unknown key " if isinstance(error, KeyError | AttributeError) else ""
        message = message.replace("\\n", ". ").replace("\\", "").replace("'", "")
        raise UserError(f"--config: {kind}{message}") from error


def parse_flags(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Parses flags; raises `UserError` for a wrong flag or value, and for an argument that is no flag."""
    try:
        left = values(["", *arguments])
    except flags.Error as error:
        raise UserError(f"{error}; see --help") from error
    if len(left) > 1:
        raise UserError(f"unexpected argument {left[1]!r}; flags start with --, see --help")


def config_of(values: flags.FlagValues) -> ConfigDict:
    """Returns the configuration among parsed flags.

    Raises:
      UserError: there is none, or its file could not be loaded.
    """
    config: Any = values["config"].value
    if config is None:
        raise UserError("--config is missing; pass --config=NAME or --config=FILE, as in configs/")
    if not isinstance(config, ConfigDict):
        path = config_flags.get_config_filename(values["config"])
        raise UserError(f"--config: cannot load {path}; expected a file of configs/")
    return config


def _with_config_files(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with the files of experiments that are given by name."""
    resolved = list(arguments)
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if equals:
            resolved[index] = f"{flag}={config_file(value)}"
        elif index + 1 < len(arguments):
            resolved[index + 1] = config_file(arguments[index + 1])
    return resolved


def config_file(value: str) -> str:
    """Returns ``NAME[:ARGUMENT]`` with the file of the experiment; a path stays what it is.

    Raises:
      UserError: there is no experiment of that name.
    """
    name, colon, argument = value.partition(":")
    if not name or name.endswith(".py") or "/" in name:
        return value
    file = CONFIGS / f"{name}.py"
    if not file.is_file():
        known = [path.stem for path in CONFIGS.glob("[!_]*.py")]
        raise UserError(f"--config is {name!r}, which is no experiment{nearest(name, known)}")
    return f"{file}{colon}{argument}"
