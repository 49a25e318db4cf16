"""Runs a piece in a process of its own, which gives the device back when it ends, however it ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pieces.piece import Piece

ROOT = Path(__file__).parents[2]
# So that two processes that follow each other closely, or a piece and what it starts, share a GPU.
DEFAULTS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}


def run(piece: Piece, limit: float, log: Path) -> dict[str, Any]:
    """Returns what a piece found, its ``error`` if it failed, and the ``seconds`` that it took.

    Args:
      piece: what to run.
      limit: seconds after which it is killed; what it has found until then counts.
      log: file to which all that it prints is added.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="accelerator_") as directory, log.open("a") as output:
        result = Path(directory) / "found.json"
        print(f"--- {piece.part}: {piece.name}", file=output, flush=True)
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.pieces", str(result)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=_environment(piece.environment),
            start_new_session=True,  # so that what it has started ends with it
        )
        problem = _wait(process, json.dumps({"call": piece.call, "arguments": piece.arguments}), limit)
        found = json.loads(result.read_text()) if result.exists() else {}
    if problem and "error" not in found:
        found["error"] = f"{problem}{_last_words(log, start)}"
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of the process; its flags of XLA come after those that are already set."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), more.get("XLA_FLAGS"))))
    known = {**DEFAULTS, **os.environ, "PYTHONPATH": path, **more}
    return known | ({"XLA_FLAGS": flags} if flags else {})


def _wait(process: subprocess.Popen[str], request: str, limit: float) -> str:
    """Returns why a process did not end well, "" if it did; it and what it started are gone then."""
    try:
        process.communicate(request, timeout=max(limit, 1))
        status = process.returncode
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        return f"ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_words(log: Path, start: int) -> str:
    """Returns what a process said last: an abort of C++ first says why, then lists its stack."""
    with log.open(errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    reasons = [line for line in lines if line.startswith("F") or "Error" in line]
    return f": {(reasons or lines)[-1][:300]}" if lines else ""
