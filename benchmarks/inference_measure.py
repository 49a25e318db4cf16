"""Measures the sides of `inference` in turn, then the start of each; the command is in `inference`."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import inference_sides
from benchmarks.first_answer import STAGES
from benchmarks.floor import best_rate
from benchmarks.inference_sides import REFERENCE_COMPILED, SIDES, Subject
from benchmarks.machine import commit
from benchmarks.workload import Plan, Worker
from bvit_jax.data.cores import usable_cores
from bvit_jax.errors import UserError
from bvit_jax.report.machine import cpu_model, versions

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much is measured.

    Attributes:
      settings: that replace those of the binary model.
      deit: settings of transformers' DeiT.
      rounds: of each side.
      seconds: of a round, about.
      starts: with a warm cache.
      ceilings: the scale of `ceilings.default_sizes`.
    """

    settings: dict[str, Any]
    deit: dict[str, Any]
    rounds: int
    seconds: float
    starts: int
    ceilings: float


def measure(
    sides: Sequence[str],
    left_out: dict[str, str],
    *,
    batches: Sequence[int],
    threads: Sequence[int],
    amount: Amount,
    reference: Path | None,
    isa: str | None,
    at_once: int,
) -> Iterator[dict[str, Any]]:
    """Yields what has been found so far, ready for JSON, after each batch and after the starts of each side.

    Args:
      sides: keys of `SIDES`.
      left_out: why others are not measured; gets those that turn out not to run.
      batches: batch sizes.
      threads: numbers of threads.
      amount: how much.
      reference: checkout of the PyTorch code.
      isa: a key of `inference_sides.ISA`, or None for the best vector unit.
      at_once: see `inference_sides.Subject`.

    Raises:
      UserError: no side can run.
    """
    if not sides:
        raise _nothing(left_out)
    found = _about(isa)
    ceilings: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    starts: dict[str, Any] = {}
    found |= {"ceilings": ceilings, "runs": runs, "starts": starts, "left_out": left_out}
    with tempfile.TemporaryDirectory(prefix="inference_") as name, inference_sides.on_cpu(isa):
        directory = Path(name)
        found["vector_units"] = elsewhere(inference_sides.vector_units)
        found["model"] = model = elsewhere(inference_sides.write_models, amount.settings, directory)
        subject = Subject("", model["settings"], amount.deit, directory, reference, max(threads), at_once)
        for count in threads:
            at_count = dataclasses.replace(subject, threads=count)
            ceilings[str(count)] = rates = _ceilings(at_count, amount)
            for batch in batches:
                if measured := _measure_batch(sides, at_count, batch, amount, left_out):
                    runs.append({"threads": count, "batch": batch, "sides": measured})
                    _add_floors(runs, model["binary_macs"], ceilings)
                    yield found
            for name, rounds in _ceilings(at_count, amount).items():  # noise lowers them
                rates[name] += rounds
        _add_floors(runs, model["binary_macs"], ceilings)
        if not runs:
            raise _nothing(left_out)
        for side in sides:
            _say(f"{side}: first answers")
            try:
                starts[side] = first_answers(dataclasses.replace(subject, side=side), amount.starts)
            except UserError as error:
                _leave_out(f"{side}, first answer", error, left_out)
            yield found


def _about(isa: str | None) -> dict[str, Any]:
    """Returns what the figures depend on; the load is that of other programs."""
    machine = {"cpu": cpu_model(), "cores": usable_cores(), "python": platform.python_version()}
    return {
        "machine": {**machine, "load_average": os.getloadavg()[0]},
        "versions": versions(),
        "commit": commit(),
        "isa": isa,
    }


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a function returns in a process of its own, so that this one imports no jax."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _measure_batch(
    sides: Sequence[str], subject: Subject, batch: int, amount: Amount, left_out: dict[str, str]
) -> dict[str, Any]:
    """Measures the sides in turn; returns seconds of a step in each round by side, and what else is found."""
    workers: dict[str, Worker] = {}
    found: dict[str, dict[str, Any]] = {}
    where = f"batch {batch}, {subject.threads} threads"
    for side in sides:
        try:
            workers[side], found[side] = _started(side, subject, batch)
        except UserError as error:
            _leave_out(f"{side}, {where}", error, left_out)
    steps = {
        side: max(1, round(amount.seconds / worker.seconds("forward", 1))) for side, worker in workers.items()
    }
    for number in range(1, amount.rounds + 1):
        for side, worker in workers.items():
            found[side]["seconds"].append(worker.seconds("forward", steps[side]) / steps[side])
        times = ", ".join(f"{side} {1e3 * of['seconds'][-1]:.1f}" for side, of in found.items())
        _say(f"{where}, round {number}/{amount.rounds}, ms: {times}")
    for side, worker in workers.items():
        found[side]["peak"] = worker.finish().peak
    return found


def _started(side: str, subject: Subject, batch: int) -> tuple[Worker, dict[str, Any]]:
    """Returns a side that is compiled and warm, and what it reports; raises `UserError` if it cannot run."""
    plan = _plan(subject, side, batch)
    worker = Worker(SIDES[side], inference_sides.start, plan, dataclasses.replace(subject, side=side))
    try:
        compiling = worker.prepare().compile_seconds.get("forward")
    except UserError:
        with contextlib.suppress(UserError, OSError):  # its process has ended
            worker.finish()
        raise
    return worker, {"mode": worker.facts.mode, "compile_seconds": compiling, "seconds": []}


def _plan(subject: Subject, side: str, batch: int) -> Plan:
    compiled = side == REFERENCE_COMPILED
    cache = subject.models / f"threads{subject.threads}"  # of Inductor; a C++ compiler gets it unquoted
    return Plan(
        "binaryvit", None, {}, batch, "float32", subject.reference, compiled, kinds=("forward",), cache=cache
    )


def _leave_out(what: str, error: UserError, left_out: dict[str, str]) -> None:
    left_out[what] = str(error)
    _say(f"{what} is left out: {error}")


def _nothing(left_out: dict[str, str]) -> UserError:
    reasons = "; ".join(f"{what}: {reason}" for what, reason in left_out.items())
    return UserError(f"no side can run: {reasons}")


def _ceilings(subject: Subject, amount: Amount) -> dict[str, list[float]]:
    return elsewhere(inference_sides.ceilings, subject, amount.ceilings, min(3, amount.rounds))


def _add_floors(
    runs: Sequence[dict[str, Any]], macs: int, ceilings: dict[str, dict[str, list[float]]]
) -> None:
    """Adds the seconds of a batch's binary operations at the ceiling, and the share of it that is reached."""
    for run in runs:
        ceiling = max(map(best_rate, ceilings[str(run["threads"])].values()))
        floor = 2 * macs * run["batch"] / ceiling
        for side in run["sides"].values():
            side |= {"floor_seconds": floor, "share_of_floor": floor / min(side["seconds"])}


def first_answers(subject: Subject, starts: int) -> dict[str, Any]:
    """Returns the stages of a start with an empty cache, ``cold``, and of others after it, ``warm``."""
    with tempfile.TemporaryDirectory(prefix="inference_cache_") as cache:
        cold = stages(subject, Path(cache))
        return {"cold": cold, "warm": [stages(subject, Path(cache)) for _ in range(starts)]}


def stages(subject: Subject, cache: Path) -> list[dict[str, Any]]:
    """Starts a process that classifies one image; returns seconds since its start, and memory, by stage.

    Raises:
      UserError: the process fails; has the end of what it said.
    """
    file = cache / "subject.pickle"
    file.write_bytes(pickle.dumps(subject))
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    command = [sys.executable, "-m", "benchmarks.first_answer", str(file)]
    with (cache / "stderr").open("w+") as errors:
        began = time.perf_counter()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **variables},
        ) as process:
            lines = process.stdout or ()
            found = [{**json.loads(line), "seconds": time.perf_counter() - began} for line in lines]
        if process.returncode != 0 or len(found) != len(STAGES):
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"status {process.returncode}"]
            raise UserError(f"{subject.side}: the process that classifies one image failed: {said[-1]}")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
