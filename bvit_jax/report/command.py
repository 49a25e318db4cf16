"""Reports on runs, networks and what they cost: ``bvit report COMMAND --help``

Each report is imported when it is asked for.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError
from bvit_jax.files import any_path, local_path
from bvit_jax.runtime.arguments import add_noema, parse_config


def run(argv: list[str]) -> None:
    """Runs the command."""
    parser = _parser()
    arguments, config_flags = parser.parse_known_args(argv)
    if config_flags and not arguments.takes_config:
        parser.error(f"unrecognized arguments: {' '.join(config_flags)}")
    arguments.config_flags = config_flags
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bvit report", description=__doc__, allow_abbrev=False)
    parser.set_defaults(takes_config=False)
    subparsers = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, text: str, takes_config: bool = False) -> argparse.ArgumentParser:
        more = " --config=FILE[:ARGUMENT] and --config.KEY=VALUE are those of train.py."
        command = subparsers.add_parser(
            name, help=text, description=text + more * takes_config, allow_abbrev=False
        )
        command.set_defaults(run=run, takes_config=takes_config)
        return command

    curves = add("curves", _curves, "draw the training curves of runs as a PNG file.")
    curves.add_argument("workdirs", nargs="+", type=any_path, metavar="WORKDIR")
    _add_output(curves, "curves.png", "FILE")

    _add_network(add("network", _network, "draw the weights, signs, attention and positions of a model."))

    cost = add("cost", _cost, "what a model costs: parameters, operations, memory.", takes_config=True)
    cost.add_argument("--checkpoint", type=any_path, help="a run or a checkpoint, instead of --config")
    cost.add_argument("--depth", type=int, default=0, help="add deeper modules to the one above them")
    cost.add_argument("--json", action="store_true", help="print JSON")

    capability = add(
        "capability", _capability, "representational capability, step by step.", takes_config=True
    )
    capability.add_argument("--all", action="store_true", help="the published networks and the ablation")
    capability.add_argument("--json", action="store_true", help="print JSON")

    add("table", _table, "print the table of models in README.md, in Markdown")
    add("settings", _settings, "print the tables of settings in docs/settings.md, in Markdown")
    return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=any_path,
        required=True,
        metavar="PATH",
        help="a run, or what convert reads",
    )
    parser.add_argument(
        "--kind", choices=("latest", "best"), help="checkpoint of a workdir (default: latest)"
    )
    add_noema(parser)
    parser.add_argument(
        "--image",
        type=local_path,
        nargs="+",
        metavar="FILE",
        help="input images (default: ten digits for a model of digits, else a portrait)",
    )
    _add_output(parser, "network", "DIR")


def _add_output(parser: argparse.ArgumentParser, default: str, metavar: str) -> None:
    parser.add_argument(
        "--output", type=local_path, default=Path(default), metavar=metavar, help=f"default: {default}"
    )


def _curves(arguments: argparse.Namespace) -> None:
    from bvit_jax.report import curves

    curves.save_picture(curves.read_runs(arguments.workdirs), arguments.output)
    sys.stdout.write(f"{arguments.output}\n")


def _network(arguments: argparse.Namespace) -> None:
    from bvit_jax.report import network

    network.run(arguments)


def _cost(arguments: argparse.Namespace) -> None:
    from bvit_jax.report import cost

    config_flags = arguments.config_flags
    if arguments.checkpoint is not None and config_flags:
        raise UserError(
            f"--checkpoint={arguments.checkpoint} describes its model; leave out {config_flags[0]}"
        )
    if arguments.depth < 0:
        raise UserError(f"--depth is {arguments.depth}; expected 0, for every module, or more")
    if arguments.checkpoint is not None:
        subject = cost.read_subject(arguments.checkpoint)
    else:
        subject = cost.subject_of(parse_config(config_flags))
    report = cost.figures(subject, arguments.depth)
    text = json.dumps(report, indent=2) + "\n" if arguments.json else cost.as_text(report, _columns())
    sys.stdout.write(text)


def _columns() -> int:
    """Returns the width of the terminal, 0 where stdout is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def _capability(arguments: argparse.Namespace) -> None:
    from bvit_jax.report import capability

    config_flags = arguments.config_flags
    if arguments.all and config_flags:
        raise UserError(f"--all takes no configuration; leave out {config_flags[0]}")
    if arguments.all:
        derivations = capability.all_derivations()
    else:
        derivations = [capability.derivation_of(parse_config(config_flags))]
    if arguments.json:
        sys.stdout.write(json.dumps(capability.figures(derivations), indent=2) + "\n")
    else:
        sys.stdout.write(capability.as_text(derivations))


def _table(_: argparse.Namespace) -> None:
    from bvit_jax.report import models

    sys.stdout.write(models.as_markdown() + "\n")


def _settings(_: argparse.Namespace) -> None:
    from bvit_jax.report import settings

    sys.stdout.write(settings.as_markdown() + "\n")
