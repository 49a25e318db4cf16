"""The command: ``bvit parity {check,layers,dump} ...``"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from bvit_jax.data.progress import ProgressBar
from bvit_jax.errors import UserError
from bvit_jax.files import local_path
from bvit_jax.parity.check import check
from bvit_jax.parity.dump import DEFAULT_BATCH, dump
from bvit_jax.parity.layers import LayerRow, layer_rows
from bvit_jax.runtime import process
from bvit_jax.runtime.arguments import add_set

Row = TypeVar("Row")
EXIT_FAILED, EXIT_UNREADABLE = 1, 2
FLIPS = ("torch float32", "float32", "bfloat16")


def _computed(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows, with a sign of life on the terminal while they are computed."""
    with ProgressBar("running the model", 1) as bar:
        done = list(rows)
        bar.advance()
    return done


def _check(path: Path) -> bool:
    """Prints the table of one file and returns whether all of it passes."""
    print(path)
    rows = []
    for row in _computed(check(path)):
        rows.append(row)
        verdict = "pass" if row.passed else "FAIL"
        name = row.where or row.group
        print(f"  {row.group:<20}{row.count:>5}  {row.error:9.2e}  {verdict}  {name}", flush=True)
    return all(row.passed for row in rows)


def _layers(path: Path) -> bool:
    """Prints the layers of one file and returns whether all of them pass."""
    print(path)
    rows = _computed(layer_rows(path))
    width = max(len(row.name) for row in rows)
    print(f"  {'':<{width}}  {'':9}  {'':4}  share of flipped signs")
    print(f"  {'layer':<{width}}  {'error':>9}  {'':4}" + "".join(f"{title:>15}" for title in FLIPS))
    for row in rows:
        verdict = "pass" if row.passed else "FAIL"
        shares = "".join(f"{_share(row, title):>15}" for title in FLIPS)
        print(f"  {row.name:<{width}}  {row.error:9.2e}  {verdict}{shares}")
    first = next((row for row in rows if not row.passed), None)
    if first is None:
        print("  no difference in float64: flipped signs are the rounding of the narrower dtype")
    else:
        print(
            f"  first difference: {first.name} ({first.path or 'not in our model'}); "
            "look there, and between it and the layer above"
        )
    return first is None


def _share(row: LayerRow, title: str) -> str:
    share = row.flips.get(title)
    return "-" if share is None else "0" if share == 0 else f"{share:.1e}"


def _status(report: Callable[[Path], bool], path: Path) -> int:
    """Returns the exit status after the report on one file."""
    try:
        return 0 if report(path) else EXIT_FAILED
    except UserError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return EXIT_UNREADABLE


def _dump(arguments: argparse.Namespace) -> int:
    try:
        dump(
            arguments.out,
            arguments.repo,
            python=arguments.python,
            model=arguments.model,
            checkpoint=arguments.checkpoint,
            images=arguments.images,
            batch=arguments.batch,
            seed=arguments.seed,
            compact=arguments.compact,
            overrides=dict(map(_setting, arguments.set)),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """Returns the key and the value of ``KEY=VALUE``; a value that is not JSON is text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set is {text!r}; expected KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bvit parity", description="Compares our models with PyTorch's.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("check", "compare our models with golden files"),
        ("layers", "compare layer by layer, and count flipped signs"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("files", nargs="+", type=local_path, metavar="FILE")
    dumper = commands.add_parser("dump", help="run the PyTorch code and write a golden file")
    dumper.add_argument("out", type=local_path, metavar="OUT", help="file to write; must not exist")
    dumper.add_argument("--repo", required=True, type=local_path, help="checkout of the PyTorch code")
    dumper.add_argument("--python", default=sys.executable, help="its Python interpreter (default: this one)")
    dumper.add_argument("--model", help="one of our configurations, such as binaryvit_small:some_fp")
    dumper.add_argument("--checkpoint", type=local_path, metavar="PTH", help="weights (default: random ones)")
    dumper.add_argument(
        "--images",
        type=local_path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="JPEG or PNG files",
    )
    dumper.add_argument("--batch", type=int, help=f"number of random images (default: {DEFAULT_BATCH})")
    dumper.add_argument("--seed", type=int, default=0, help="seed for everything random (default: 0)")
    dumper.add_argument("--compact", action="store_true", help="compress; large outputs in float32")
    add_set(dumper, "an argument of the PyTorch code or a key of its config.json", str)
    return parser


def run(argv: list[str]) -> int:
    """Runs the command; returns 0 if all is well, 1 if a comparison fails, 2 if a file cannot be used."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "dump":
        return _dump(arguments)
    report = {"check": _check, "layers": _layers}[arguments.command]
    with process.on_cpu():  # float64 on every machine
        return max([_status(report, path) for path in arguments.files])
