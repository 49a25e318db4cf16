"""A program of someone else's that uses the library; prints what the library changed of its process.

python -m tests.library_use DIR
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

# What these change when they are imported is not our doing.
import google_crc32c  # noqa: F401
import grain  # noqa: F401
import jax
import numpy as np
import orbax.checkpoint  # noqa: F401
import sklearn.datasets  # noqa: F401
import tensorflow_datasets  # noqa: F401
from absl import flags

import bvit_jax
from tests.configs import tiny

with contextlib.suppress(ImportError):
    import tensorboardX  # noqa: F401


def state() -> dict[str, Any]:
    """Returns what a process has one of."""
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    return {
        "environment": dict(os.environ),
        "handlers of signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "settings of JAX": dict(jax.config.values),
        "log": {log.name: (log.level, log.propagate, list(log.handlers)) for log in loggers},
        "warnings": list(warnings.filters),
        "flags": flags.FLAGS.is_parsed(),
        "directory": os.getcwd(),
    }


def main(directory: Path) -> None:
    """Builds, loads, predicts, trains and evaluates."""
    before, called = state(), []
    gc.disable = lambda: called.append("gc.disable")
    os._exit = lambda status: called.append("os._exit")
    signal.signal = lambda *arguments: called.append("signal.signal")

    bvit_jax.create_model(bvit_jax.model_config("binaryvit"))
    teacher = bvit_jax.load(Path(bvit_jax.__file__).parent / "assets" / "deit_digits")
    bvit_jax.predict(teacher, np.zeros((1, 8, 8, 3), np.uint8))
    config = tiny.get_config("real")
    config.data.data_dir = str(directory / "data")
    config.batch_size, config.epochs = 718, 1
    bvit_jax.train_and_evaluate(config, directory / "run")
    bvit_jax.evaluate(directory / "run", "latest", {})

    after = state()
    after["log"] = {name: after["log"][name] for name in before["log"]}  # others are new
    sys.stdout.write(f"{[*(name for name, value in before.items() if after[name] != value), *called]}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
