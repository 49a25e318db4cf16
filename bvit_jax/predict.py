"""``python -m bvit_jax.predict``, the same as ``bvit predict``; `bvit_jax.predict` itself is a function."""

from bvit_jax import cli

if __name__ == "__main__":
    cli.run("predict")
