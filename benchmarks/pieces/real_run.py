"""A training run of the digits on this device: its accuracy, and that it resumes bit for bit.

One run goes through; another one gets SIGTERM in the middle, ends in order, and is resumed. Both must end
with the same weights and the same metrics. This piece's own process stays on the CPU.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pieces.process import ROOT
from bvit_jax.errors import UserError

DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_exclude_nondeterministic_ops=true"
LIMIT = 400  # seconds, of one process
STOPPED = 128 + signal.SIGTERM
# What depends on the time.
TIMED = ("second", "utilization", "wait", "memory")


def digits(epochs: int) -> Iterator[dict[str, Any]]:
    """Yields the accuracy of the run, then whether the other one has ended in the same state."""
    with tempfile.TemporaryDirectory(prefix="real_run_") as directory:
        whole, broken = Path(directory) / "whole", Path(directory) / "broken"
        began = time.perf_counter()
        _finish(_start(whole, directory, epochs), 0)
        accuracies = [line["eval_top1"] for line in _metrics(whole) if "eval_top1" in line]
        yield {"top1": accuracies[-1], "run_seconds": time.perf_counter() - began}

        process = _start(broken, directory, epochs)
        _wait_for_half(process, broken, len(_metrics(whole)) // 2)
        process.send_signal(signal.SIGTERM)
        _finish(process, STOPPED)
        done = len(_metrics(broken))
        _finish(_start(broken, directory, epochs), 0)
        yield {
            "interrupted_after_lines": done,
            "same_metrics": _metrics(broken) == _metrics(whole),
            "same_weights": _weights(broken) == _weights(whole),
        }


def _start(workdir: Path, directory: str, epochs: int) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, str(ROOT / "train.py"), "--config=digits", f"--workdir={workdir}"),
        *(f"--config.epochs={epochs}", f"--config.eval_every_epochs={max(epochs // 9, 1)}"),
        *("--config.log_every_steps=11", f"--config.data.data_dir={directory}/data"),
    ]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    variables = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    variables |= {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": f"{directory}/compiled"}
    return subprocess.Popen(command, cwd=ROOT, env=variables, text=True)


def _wait_for_half(process: subprocess.Popen[str], workdir: Path, lines: int) -> None:
    """Waits until a run has written some lines of metrics.

    Raises:
      UserError: it ended before, or takes too long.
    """
    deadline = time.monotonic() + LIMIT
    while len(_metrics(workdir)) < lines:
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"the run that was to be interrupted has status {process.poll()} too early")
        time.sleep(0.02)


def _finish(process: subprocess.Popen[str], expected: int) -> None:
    """Waits for the end of a run; raises `UserError` if it ends with another status."""
    status = process.wait(LIMIT)
    if status != expected:
        raise UserError(f"a run ended with status {status}; expected {expected}")


def _metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of metrics.jsonl without what depends on the time."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in line.items() if not any(part in k for part in TIMED)} for line in parsed]


def _weights(workdir: Path) -> str:
    """Returns the digest of parameters and running statistics of a run's last checkpoint."""
    from bvit_jax.workdir.runs import load_run

    return load_run(workdir, "latest").digest()
