"""Trains a model: ``python train.py --config=configs/digits.py --workdir=DIR``."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from bvit_jax import cli
from bvit_jax.errors import UserError
from bvit_jax.plan import topology

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment, a file of configs/, with an argument after a colon where it takes one"
    " (default: configs/digits.py).",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run: checkpoints, metrics, config.json. Continues what is there.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Build everything, compile the step, print its cost as JSON, and stop."
)
_DEBUG_NANS = flags.DEFINE_bool(
    "debug_nans", False, "Stop at the first operation that makes a NaN, and name it; slower."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "With --dry_run: TPU chips to compile for, such as v5e:16x16, in place of the devices that are here.",
)
cli.define_cluster_flags()


def main(argv: list[str]) -> None:
    """Runs the command."""
    cli.no_arguments(argv)
    if _TOPOLOGY.value:
        topology.prepare()  # the chips of this machine, if any, are left alone
    else:
        cli.start_jax()
    from bvit_jax.plan.dry_run import dry_run, table
    from bvit_jax.training.evaluation import to_json
    from bvit_jax.training.loop import train_and_evaluate

    config = cli.loaded_config(_CONFIG.value)
    if _DRY_RUN.value and _DEBUG_NANS.value:
        raise UserError("--debug_nans runs the steps that --dry_run leaves out; leave out one of them")
    if _DRY_RUN.value:
        figures = dry_run(config, _TOPOLOGY.value)
        sys.stderr.write(table(figures) + "\n")
    elif _TOPOLOGY.value:
        raise UserError(f"--topology={_TOPOLOGY.value} is for planning only; add --dry_run")
    else:
        workdir = cli.required("workdir", _WORKDIR.value)
        figures = train_and_evaluate(config, Path(workdir).expanduser(), debug_nans=_DEBUG_NANS.value)
    cli.print_result(to_json(figures))


if __name__ == "__main__":
    cli.run(main, default_config=Path(__file__).parent / "configs" / "digits.py")
