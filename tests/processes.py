"""Real training processes, and what they leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from bvit_jax import config as config_lib
from bvit_jax import models, optim
from bvit_jax.runtime.mesh import make_mesh
from bvit_jax.training.steps.state import abstract_state
from bvit_jax.workdir.checkpoint import Checkpoints
from tests.quick import xla_flags

ROOT = Path(__file__).parent.parent
TIMES = (
    "images_per_second",
    "images_per_second_per_chip",
    "flops_utilization",
    "seconds_left",
    "data_wait",
    "memory_gb",
    "memory_peak_gb",
)
TIMEOUT = 240  # seconds, of a process that takes ten when nothing else runs


def command(script: str, *flags: str) -> list[str]:
    """Returns the command of a script of the repository."""
    return [sys.executable, str(ROOT / script), *flags]


def training_flags(workdir: Path, data_dir: Path, variant: str = "") -> list[str]:
    """Returns the flags of a run of seconds; see its configuration for the variants."""
    return [
        f"--config={ROOT}/tests/configs/tiny.py{variant}",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
    ]


def environment(devices: int = 1) -> dict[str, str]:
    """Some CPU devices, whatever this process simulates, and quick compilation."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests" / "without_torch"),
        "XLA_FLAGS": xla_flags(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(script: str, *flags: str, devices: int = 1, **variables: str) -> subprocess.Popen[str]:
    """Starts a script of the repository."""
    return subprocess.Popen(
        command(script, *flags),
        env=environment(devices) | variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Waits for the end of a process."""
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(script: str, *flags: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a script of the repository to its end."""
    return finish(start(script, *flags, devices=devices))


def cluster_flags(count: int, timeout: int = TIMEOUT) -> list[list[str]]:
    """Returns the flags of each of some processes of one run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--startup_timeout={timeout}"]
    return [[*shared, f"--process_id={index}"] for index in range(count)]


def start_many(count: int, *flags: str) -> list[subprocess.Popen[str]]:
    """Starts train.py as a run of some processes of one device each."""
    return [start("train.py", *flags, *own) for own in cluster_flags(count)]


def wait_for(process: subprocess.Popen[str], line_part: str) -> None:
    """Reads the log of a process until a line contains ``line_part``."""
    assert process.stderr is not None
    for line in process.stderr:
        if line_part in line:
            return
    raise AssertionError(f"{line_part!r} is not in the log")


def run_until(
    line_part: str, *flags: str, number: int = signal.SIGKILL, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs train.py and sends it a signal once a line of its log contains ``line_part``."""
    process = start("train.py", *flags, **variables)
    wait_for(process, line_part)
    process.send_signal(number)
    result = finish(process)
    assert result.returncode == (-number if number == signal.SIGKILL else 128 + number), result.stderr
    return result


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
    size = config.model.image_size
    restored = checkpoints.restore(abstract_state(model, optimizer, size, mesh, health=config.health))
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
