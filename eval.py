"""Evaluates a checkpoint: ``python eval.py --workdir=DIR [--checkpoint=best]``; the last line is JSON."""

from pathlib import Path
from typing import cast

from absl import flags

from bvit_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory that train.py wrote.")
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "latest", ["latest", "best"], "Which checkpoint: the newest or the best by top-1."
)
_EMA = flags.DEFINE_bool(
    "ema", None, "The moving average; by default where the run keeps one, --noema for the raw weights."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data directory in place of the run's.")
_SPLIT = flags.DEFINE_string("split", None, "Split in place of the run's evaluation split.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Global batch in place of the run's.")
cli.define_cluster_flags()


def main(argv: list[str]) -> None:
    """Runs the command."""
    cli.no_arguments(argv)
    cli.start_jax()
    from bvit_jax.training.evaluation import evaluate_workdir, to_json
    from bvit_jax.workdir.checkpoint import Kind

    workdir = Path(cli.required("workdir", _WORKDIR.value)).expanduser()
    kind = cast(Kind, _CHECKPOINT.value)
    overrides = {
        "data.data_dir": _DATA_DIR.value,
        "data.eval_split": _SPLIT.value,
        "eval_batch_size": _BATCH_SIZE.value,
    }
    overrides = {key: value for key, value in overrides.items() if value is not None}
    cli.print_result(to_json(evaluate_workdir(workdir, kind, overrides, _EMA.value)))


if __name__ == "__main__":
    cli.run(main)
