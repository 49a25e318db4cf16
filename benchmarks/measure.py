"""Measures the sides of `train_step` in turn: each in a process of its own, which sleeps meanwhile."""

import dataclasses
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import stand_ins
from benchmarks.machine import commit
from benchmarks.shares import add_shares, merged
from benchmarks.workload import OURS, Compilation, Facts, Kind, Memory, Plan, Side, Worker, is_ours
from bvit_jax.data.cores import usable_cores
from bvit_jax.errors import UserError
from bvit_jax.report.machine import cpu_model, versions

Rounds = dict[Kind, list[float]]  # images/s of each round
REFERENCE = "reference"
REFERENCE_FLOAT32, REFERENCE_COMPILED = "reference float32", "reference compiled"


def measure(
    plan: Plan,
    *,
    batches: Sequence[int],
    dtypes: Sequence[str | None],
    repeats: int,
    steps: dict[Kind, int],
    ceilings_scale: float,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Measures everything and returns it, ready for JSON.

    Args:
      plan: what is measured; its batch and dtype are replaced by each of the following.
      batches: batch sizes.
      dtypes: compute dtypes of the JAX code, None for the config's; each is a side.
      repeats: rounds.
      steps: number of steps in a round, by kind.
      ceilings_scale: that of `ceilings.default_sizes`; 0 measures no ceilings.
      arguments: those of the command, for the report.

    Raises:
      UserError: a side cannot be built, or the two models differ.
    """
    load = os.getloadavg()[0]  # of other programs
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the GPU to all sides
    before = _ceilings(ceilings_scale)
    runs = []
    for batch in batches:
        with tempfile.TemporaryDirectory(prefix="train_step_") as cache:
            at_batch = dataclasses.replace(plan, batch=batch, cache=Path(cache))
            runs.append(_measure_batch(at_batch, dtypes, repeats, steps))
    ceilings = merged(before, _ceilings(ceilings_scale)) if before else None
    for run in runs:
        add_shares(run, ceilings)
    return {
        "command": shlex.join(["python", "-m", "benchmarks.train_step", *arguments]),
        "machine": {
            "cpu": cpu_model(),
            "cores": usable_cores(),
            "load_average": load,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "versions": versions(),
        "commit": commit(),
        "model": plan.model or plan.config,
        "kinds": list(plan.kinds),
        "steps": {kind: steps[kind] for kind in plan.kinds},
        "ceilings": ceilings,
        "runs": runs,
    }


def _measure_batch(
    plan: Plan, dtypes: Sequence[str | None], repeats: int, steps: dict[Kind, int]
) -> dict[str, Any]:
    """Builds the sides of one batch size, measures them in turn and returns the findings."""
    plans = {_our_name(dtype): dataclasses.replace(plan, dtype=dtype) for dtype in dtypes}
    workers = {side: Worker(side, _start_jax, of_side) for side, of_side in plans.items()}
    workers |= _start_references(plan, next(iter(workers.values())).facts)
    facts = {side: worker.facts for side, worker in workers.items()}
    if len({side.parameters for side in facts.values()}) > 1:
        counts = " and ".join(f"{side.parameters:,}" for side in facts.values())
        raise UserError(f"the two models differ: {counts} parameters; check --set and the checkout")
    compilation, left_out = prepare_workers(workers)
    if not plan.cold:
        for side in plans:
            workers[side].finish()
    cached = {side: _cached_first_steps(side, of_side) for side, of_side in plans.items()}
    if not plan.cold:
        for side, of_side in plans.items():
            workers[side] = Worker(side, _start_jax, of_side)
            workers[side].prepare()  # out of the cache
    rounds: dict[str, Rounds] = {side: {kind: [] for kind in plan.kinds} for side in workers}
    for number in range(1, repeats + 1):
        for kind in plan.kinds:
            for side, worker in workers.items():
                seconds = worker.seconds(kind, steps[kind])
                rounds[side][kind].append(plan.batch * steps[kind] / seconds)
        _print_progress(plan.batch, number, repeats, rounds)
    memory = {side: worker.finish() for side, worker in workers.items()}
    works = [compilation[side].work for side in plans]
    return {
        "batch": plan.batch,
        "work": dataclasses.asdict(works[0]) if works[0] else None,  # the same in every dtype
        "sides": {
            side: {
                **entry(facts[side], compilation[side], rounds[side], memory[side]),
                "cached_first_step_seconds": cached.get(side, {}),
            }
            for side in workers
        },
        "left_out": left_out,
        "ratios": _ratios(rounds, memory),
    }


def _our_name(dtype: str | None) -> str:
    return f"{OURS} {dtype}" if dtype else OURS


def _start_references(plan: Plan, ours: Facts) -> dict[str, Worker]:
    """Starts the sides of the PyTorch code, with the settings of our model."""
    if not plan.reference:
        return {}

    def start(title: str, **changes: Any) -> Worker:
        return Worker(title, _start_torch, dataclasses.replace(plan, **changes), ours.settings)

    workers = {REFERENCE: start("the reference", compiled=False)}
    if workers[REFERENCE].facts.device != "cpu":
        workers[REFERENCE_FLOAT32] = start("the reference in float32", compiled=False, autocast=False)
    if plan.compiled:
        workers[REFERENCE_COMPILED] = start("the compiled reference")
    return workers


def prepare_workers(workers: dict[str, Worker]) -> tuple[dict[str, Compilation], dict[str, str]]:
    """Compiles all sides; removes the compiled reference where that fails, and returns the reason."""
    compilation: dict[str, Compilation] = {}
    left_out: dict[str, str] = {}
    for side, worker in list(workers.items()):
        try:
            compilation[side] = worker.prepare()
        except UserError as error:
            if side != REFERENCE_COMPILED:
                raise
            left_out[side] = str(error)
            print(f"{side} is left out: {error}", file=sys.stderr, flush=True)
            worker.finish()
            del workers[side]
    return compilation, left_out


def _cached_first_steps(side: str, plan: Plan) -> dict[Kind, float]:
    """Returns the seconds of a first step in a new process that finds its program in the cache."""
    found: dict[Kind, float] = {}
    for kind in plan.kinds:
        worker = Worker(side, _start_jax, dataclasses.replace(plan, kinds=(kind,)))
        seconds = worker.first_step(kind)
        worker.finish()
        if seconds is None:
            print(f"{side}: nothing of the {kind} step was in the compilation cache", file=sys.stderr)
        else:
            found[kind] = seconds
    return found


def entry(facts: Facts, compilation: Compilation, rounds: Rounds, memory: Memory) -> dict[str, Any]:
    """Returns what is reported of a side; the model's work, the same for all of them, is left out."""
    counted = {name: value for name, value in dataclasses.asdict(compilation).items() if name != "work"}
    return {
        **dataclasses.asdict(facts),
        **counted,
        "images_per_second": rounds,
        "memory": dataclasses.asdict(memory),
    }


def _ratios(rounds: dict[str, Rounds], memory: dict[str, Memory]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns ours over the reference's, by our side, the other side and the figure.

    For speeds, the median of the rounds' ratios, and as ``best_…`` the ratio of the two best rounds: other
    programs on the machine slow the sides down unequally, and never speed them up.
    """
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for ours in filter(is_ours, rounds):
        for theirs in (side for side in rounds if not is_ours(side)):
            found = ratios.setdefault(ours, {}).setdefault(theirs, {})
            for kind, speeds in rounds[ours].items():
                others = rounds[theirs][kind]
                found[kind] = statistics.median(a / b for a, b in zip(speeds, others, strict=True))
                found[f"best_{kind}"] = max(speeds) / max(others)
            found["memory"] = memory[ours].peak / memory[theirs].peak
    return ratios


def _start_jax(plan: Plan, context: None) -> Side:
    if plan.config is None:
        stand_ins.provide()
    from benchmarks import jax_side  # here, because only the process of this side may import jax

    return jax_side.start(plan, context)


def _start_torch(plan: Plan, context: dict[str, Any]) -> Side:
    from benchmarks import torch_side  # likewise

    return torch_side.start(plan, context)


def _print_progress(batch: int, number: int, repeats: int, rounds: dict[str, Rounds]) -> None:
    speeds = "; ".join(
        f"{side} " + ", ".join(f"{kind} {speeds[-1]:.2f}" for kind, speeds in of_side.items())
        for side, of_side in rounds.items()
    )
    print(f"batch {batch}, round {number}/{repeats}, images/s: {speeds}", file=sys.stderr, flush=True)


# Ceilings, and what is reached of them


def _ceilings(scale: float) -> dict[str, Any] | None:
    """Returns what `ceilings.measure` finds, in a process of its own that gives its memory back."""
    if not scale:
        return None
    print("measuring the ceilings of the machine", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_ceilings, scale).result()


def _measure_ceilings(scale: float) -> dict[str, Any]:
    import jax

    from benchmarks import ceilings  # here, because only processes of its own may import jax

    return ceilings.measure(ceilings.default_sizes(jax.default_backend(), scale))
