"""The numbers of the PyTorch code, recomputed on this device: golden files, and what narrow types change.

Every file is judged as ``bvit parity check`` judges it on a CPU, in float64 and with the same tolerances.
What float32 and bfloat16 change is measured for JAX's default precision of products, TF32 on NVIDIA's GPUs
and bfloat16 on TPUs, and for the highest.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.pieces.piece import one_line
from benchmarks.pieces.process import ROOT

GOLDEN = ROOT / "tests" / "golden"
PRECISIONS = ("default", "highest")


def golden(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields for each file whether our model passes on this device, and the rows of its comparison."""
    from bvit_jax.parity.check import check

    for name in files:
        began, rows, error = time.perf_counter(), [], ""
        try:
            with _whole(name) as path:
                for row in check(path):
                    rows.append(_row(row))
        except Exception as problem:  # the next file may pass
            error = one_line(problem)
        passed = bool(rows) and not error and all(row["passed"] for row in rows)
        seconds = round(time.perf_counter() - began, 1)
        yield {name: {"passed": passed, "error": error, "rows": rows, "seconds": seconds}}


def _row(row: Any) -> dict[str, Any]:
    return {
        "group": row.group,
        "arrays": row.count,
        "error": row.error,
        "ratio": row.ratio,
        "where": row.where,
        "passed": row.passed,
    }


def narrow(file: str, precisions: Sequence[str] = PRECISIONS) -> Iterator[dict[str, Any]]:
    """Yields by precision of products what narrow types change: signs, and with them the logits."""
    from bvit_jax.parity.golden import GoldenFile
    from bvit_jax.parity.layers import NARROW, flipped_signs

    with _whole(file) as path:
        golden = GoldenFile(path)
    for precision in precisions:
        with jax.default_matmul_precision(precision):
            flips = flipped_signs(golden)
            errors = {name: _logits_error(golden, dtype) for name, dtype in NARROW.items()}
        yield {
            precision: {
                name: {
                    "logits_error": errors[name],
                    "mean": statistics.fmean(shares.values()),
                    "max": max(shares.values()),
                    "layers": shares,
                }
                for name, shares in flips.items()
            }
        }


def _logits_error(golden: Any, dtype: Any) -> float:
    """Returns the error of the logits that our model computes in a dtype, relative to the largest."""
    from bvit_jax.models import create_model
    from bvit_jax.parity.golden import compare
    from bvit_jax.parity.subject import subject_of
    from bvit_jax.weights.state_dicts import abstract_variables, from_state_dict

    subject = subject_of(golden.meta)
    model = create_model(subject.config, dtype)
    abstract = abstract_variables(model, subject.config.image_size)
    naming = subject.file_format.naming(subject.config)
    variables = from_state_dict(golden.group("state"), abstract, np.float32, naming)
    output: Any = jax.jit(model.apply)(variables, golden.images().astype(np.float32))
    return compare("", {"": output.logits}, {"": golden.array("eval/logits")}).error


@contextlib.contextmanager
def _whole(name: str) -> Iterator[Path]:
    """Lends a golden file whose parts, if there are two, are put together."""
    first, second = GOLDEN / f"{name}.npz", GOLDEN / f"{name}-part2.npz"
    if not second.exists():
        yield first
        return
    with tempfile.TemporaryDirectory() as directory, np.load(first) as a, np.load(second) as b:
        whole = Path(directory) / first.name
        np.savez(whole, **a, **b)
        yield whole
