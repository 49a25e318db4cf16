"""The console script ``bvit``, which is also ``python -m bvit_jax``."""

import signal


def console() -> None:
    """Runs the command in a process of its own."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until the imports are done there is nothing to tidy up: Ctrl-C ends the process without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from bvit_jax import cli

    cli.run()


if __name__ == "__main__":
    console()
