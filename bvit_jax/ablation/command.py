"""Trains the runs of a study and compares them: ``bvit ablate STUDY --dir DIR``

STUDY is a file of configs/studies or like them, by name or path. Every run has a workdir in DIR. A study
that was stopped or killed continues with the same command, and one that is finished only prints its table
again; DIR also receives it as table.md and, if matplotlib is installed, figure.png.
"""

import argparse
import sys

from bvit_jax.ablation.study import load_study
from bvit_jax.errors import UserError
from bvit_jax.files import local_path, replace_file
from bvit_jax.runtime import process
from bvit_jax.runtime.arguments import add_set


def run(argv: list[str]) -> None:
    """Runs the command."""
    arguments = _parser().parse_args(argv)
    study = load_study(arguments.study).chosen(arguments.rows, arguments.seeds)
    study = study.changed(dict(arguments.set))
    process.prepare_to_compute()
    from bvit_jax.ablation.figure import save_figure
    from bvit_jax.ablation.runs import run_study
    from bvit_jax.ablation.table import as_markdown
    from bvit_jax.runtime.interruption import Interruption

    results = run_study(study, arguments.dir, lambda: Interruption(sigterm=process.is_ours()))
    table = as_markdown(study, results)
    replace_file(arguments.dir / "table.md", f"{table}\n".encode())
    sys.stdout.write(f"{table}\n")
    try:
        save_figure(study, results, arguments.dir, arguments.dir / "figure.png")
    except UserError as error:
        sys.stderr.write(f"no figure: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bvit ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY[:ARGUMENT]", help="such as icons")
    parser.add_argument("--dir", type=local_path, required=True, help="where the runs are")
    parser.add_argument(
        "--rows", action="append", default=[], metavar="ROW", help="only this one; repeatable"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[], metavar="N", help="in place of its own")
    add_set(parser, "a setting of all runs, such as data.data_dir=DIR")
    return parser
