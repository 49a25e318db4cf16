"""``python -m bvit_jax.parity``, the same as ``bvit parity``."""

from bvit_jax import cli


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return cli.main(["parity", *argv])


if __name__ == "__main__":
    cli.run("parity")
