"""Real training processes, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from bvit_jax import config as config_lib
from bvit_jax import models, optim
from bvit_jax.checkpoint import Checkpoints
from bvit_jax.sharding import make_mesh
from bvit_jax.train_state import abstract_state

ROOT = Path(__file__).parent.parent
TIMES = ("images_per_second", "seconds_left", "data_wait")
CACHE = tempfile.mkdtemp(prefix="bvit_jax_compiled_")


def command(script: str, *flags: str) -> list[str]:
    """Returns the command of a script of the repository."""
    return [sys.executable, str(ROOT / script), *flags]


def environment() -> dict[str, str]:
    """One CPU device, whatever this process simulates, and what earlier processes compiled."""
    return {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    """Runs a script of the repository to its end."""
    return subprocess.run(
        command(script, *flags), env=environment(), cwd=ROOT, capture_output=True, text=True
    )


def run_until(line_part: str, *flags: str) -> None:
    """Runs train.py and kills it once a line of its log contains ``line_part``."""
    process = subprocess.Popen(
        command("train.py", *flags), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line_part in line:
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL


def metrics_of(workdir: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl without what depends on the time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """Returns every array of the newest checkpoint."""
    config = config_lib.load(workdir / "config.json")
    model = models.create_model(config.model)
    optimizer = optim.make_optimizer(config.optim, lambda step: 1.0)
    mesh = make_mesh(jax.devices()[:1])
    checkpoints = Checkpoints(workdir, keep=2)
    restored = checkpoints.restore(abstract_state(model, optimizer, config.model.image_size, mesh))
    checkpoints.close()
    assert restored is not None
    leaves = jax.tree_util.tree_leaves_with_path(restored[0])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_runs(broken: Path, whole: Path) -> None:
    """Asserts that two runs ended in the same state, by the same way, bit for bit."""
    assert metrics_of(broken) == metrics_of(whole)
    ours, theirs = final_state(broken), final_state(whole)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
