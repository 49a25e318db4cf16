"""From a training run to PyTorch's names: ``python -m bvit_jax.convert WORKDIR TARGET``."""

import argparse
import sys
from pathlib import Path

import jax

from bvit_jax import config as config_lib
from bvit_jax import data, models
from bvit_jax.checkpoint import Kind, restore_variables
from bvit_jax.errors import UserError
from bvit_jax.pretrained import abstract_variables, save_pretrained
from bvit_jax.sharding import with_sharding


def export_workdir(workdir: Path, target: Path, kind: Kind = "latest") -> None:
    """Writes the DeiT of a training run as `load_pretrained` reads it.

    Raises:
      UserError: there is no such run or checkpoint, or its model is not a DeiT.
    """
    config = config_lib.load(workdir / "config.json")
    if config.model.name != "deit":
        raise UserError(
            f"the run in {workdir} trained {config.model.name!r}; only 'deit' has a Hugging Face format"
        )
    abstract = abstract_variables(models.create_model(config.model), config.model.image_size)
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restored = restore_variables(workdir, with_sharding(abstract, whole), kind)
    if restored is None:
        raise UserError(f"no {kind} checkpoint in {workdir}; train with train.py --workdir first")
    class_names = data.open_train_split(config.data).class_names
    save_pretrained(target, config.model, restored[0], list(class_names))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bvit_jax.convert",
        description="Writes the DeiT of a training run in Hugging Face's ViT format.",
    )
    parser.add_argument("workdir", type=Path, help="directory that train.py wrote")
    parser.add_argument("target", type=Path, help="directory for config.json and model.safetensors")
    parser.add_argument("--checkpoint", choices=("latest", "best"), default="latest")
    arguments = parser.parse_args(argv)
    try:
        export_workdir(arguments.workdir, arguments.target, arguments.checkpoint)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
