"""``python -m bvit_jax.report``, the same as ``bvit report``."""

from bvit_jax import cli


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return cli.main(["report", *argv])


if __name__ == "__main__":
    cli.run("report")
