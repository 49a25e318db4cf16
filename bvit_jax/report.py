"""Reports on runs and networks: ``python -m bvit_jax.report COMMAND --help``."""

import argparse
import sys

from bvit_jax import curves, network_report
from bvit_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bvit_jax.report", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    curves.add_parser(commands)
    network_report.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
