"""Evaluates a checkpoint: ``python eval.py --workdir=DIR [--checkpoint=best]`` (``bvit eval``)."""

from bvit_jax import cli

if __name__ == "__main__":
    cli.run("eval")
