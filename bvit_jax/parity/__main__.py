"""The command: ``python -m bvit_jax.parity check FILE...``"""

import argparse
import sys
from pathlib import Path

import jax

from bvit_jax.errors import UserError
from bvit_jax.parity.check import check

EXIT_FAILED, EXIT_UNREADABLE = 1, 2


def _check(path: Path) -> int:
    """Prints the table of one file and returns the exit status it calls for."""
    print(path)
    try:
        rows = []
        for row in check(path):
            rows.append(row)
            verdict = "pass" if row.passed else "FAIL"
            name = row.where or row.group
            print(f"  {row.group:<20}{row.count:>5}  {row.error:9.2e}  {verdict}  {name}", flush=True)
    except UserError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    return 0 if all(row.passed for row in rows) else EXIT_FAILED


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 if all files pass, 1 if one fails, 2 if one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bvit_jax.parity", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checker = commands.add_parser("check", help="compare our models with golden files")
    checker.add_argument("files", nargs="+", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # float64 on every machine
    return max([_check(path) for path in arguments.files])


if __name__ == "__main__":
    sys.exit(main())
