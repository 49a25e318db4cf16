"""``python -m bvit_jax.data.prepare``, the same as ``bvit prepare``."""

from bvit_jax import cli


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return cli.main(["prepare", *argv])


if __name__ == "__main__":
    cli.run("prepare")
