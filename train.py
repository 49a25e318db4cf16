"""Trains a model: ``python train.py --config=configs/digits.py --workdir=DIR`` (``bvit train``)."""

from bvit_jax import cli

if __name__ == "__main__":
    cli.run("train")
