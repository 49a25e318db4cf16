"""Measures what ranking-aware distillation adds to a training step, and its memory by the number of keys.

    python -m benchmarks.ranking --batch 8 --repeats 9
    python -m benchmarks.ranking --set depth=4 --batch 4 --json ranking.json

Run it from the root of a checkout. The student is Bi-ViT's DeiT-Ti; a real-valued one
with random weights, which really runs, is the teacher in all steps. Steps without the ranking loss, with
that of every image and with that of every second one alternate. Besides the time, the processor time of each
step is compared: on a shared machine it varies less. The loss of one layer is also
measured by itself.
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.jax_side import NORMALIZE, fixed_optimizer, random_batch
from benchmarks.workload import parse_override
from bvit_jax.data.cores import usable_cores
from bvit_jax.errors import UserError
from bvit_jax.losses.attention import Ranking
from bvit_jax.losses.ranking import ranking_loss
from bvit_jax.models import create_model
from bvit_jax.report.machine import cpu_model
from bvit_jax.runtime.mesh import make_mesh, replicated
from bvit_jax.training.steps.batch import Inputs
from bvit_jax.training.steps.programs import jit_train_step
from bvit_jax.training.steps.state import create_state
from bvit_jax.training.steps.train import Objective, TrainSettings

DEIT_TINY = {"width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768}
BOTH_TOKENS = {"distillation_token": True, "distillation_head": True}
KEYS = (49, 98, 197, 394)
ROWS = 1024  # of the loss whose memory is measured
RANKED = {"every image": Ranking(1.0), "every second image": Ranking(1.0, every=2)}
Call = Callable[[], Any]


def steps(overrides: dict[str, Any], batch: int) -> dict[str, Call]:
    """Returns the compiled steps without and with ranking, each on a state of its own; ``batch`` is even."""
    mesh = make_mesh()
    if batch % mesh.size:
        raise UserError(f"--batch is {batch}; expected a multiple of the {mesh.size} devices")
    if batch % 2:
        raise UserError(f"--batch is {batch}; expected an even number, to rank every second image")
    settings = {**DEIT_TINY, **BOTH_TOKENS, **overrides}
    student: Any = create_model({"name": "bivit_deit", **settings})
    teacher: Any = create_model({"name": "deit", **settings})
    optimizer, everywhere = fixed_optimizer(), replicated(mesh)
    key = jax.device_put(jax.random.key(0), everywhere)
    images = jnp.zeros((1, student.image_size, student.image_size, 3))
    taught = jax.jit(lambda: teacher.init(jax.random.key(1), images), out_shardings=everywhere)()
    data = random_batch(batch, student, mesh)

    def compiled(ranking: Ranking | None) -> Call:
        objective = Objective(teacher, teacher_targets="hard", distillation_weight=0.5, ranking=ranking)
        step = TrainSettings(student, optimizer, Inputs(NORMALIZE), objective, mesh=mesh)
        start = jax.jit(
            lambda: create_state(key, student, optimizer, student.image_size), out_shardings=everywhere
        )
        state = start()
        run = jit_train_step(step, mesh).lower(state, data, taught, key).compile()

        def call() -> Any:
            nonlocal state
            state, metrics = run(state, data, taught, key)
            return metrics

        return call

    return {"plain": compiled(None), **{name: compiled(ranking) for name, ranking in RANKED.items()}}


def one_layer(overrides: dict[str, Any], batch: int) -> Call:
    """Returns the compiled loss of one layer with its gradient, by itself."""
    settings = {**DEIT_TINY, "image_size": 224, "patch_size": 16, **overrides}
    keys = (settings["image_size"] // settings["patch_size"]) ** 2 + 2
    shape = (batch, settings["num_heads"], keys, keys)
    sides = [jax.nn.softmax(jax.random.normal(jax.random.key(i), shape)) for i in range(2)]
    return functools.partial(jax.jit(jax.value_and_grad(_loss)).lower(*sides).compile(), *sides)


def _loss(student: Array, teacher: Array) -> Array:
    return ranking_loss([student], [teacher], jax.random.key(2))


def alternate(calls: dict[str, Call], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Returns seconds and processor seconds of every round of each call."""
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu_seconds": []} for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            processor, began = _processor_seconds(), time.perf_counter()
            jax.block_until_ready(call())
            found[name]["seconds"].append(time.perf_counter() - began)
            found[name]["cpu_seconds"].append(_processor_seconds() - processor)
    return found


def temporaries() -> dict[int, int]:
    """Returns the bytes of temporaries of the loss of `ROWS` rows and its gradient, by number of keys."""

    found = {}
    for keys in KEYS:
        shape = jax.ShapeDtypeStruct((1, 4, ROWS // 4, keys), jnp.float32)
        compiled = jax.jit(jax.value_and_grad(_loss)).lower(shape, shape).compile()
        memory: Any = compiled.memory_analysis()
        found[keys] = memory.temp_size_in_bytes
    return found


def report(overrides: dict[str, Any], batch: int, repeats: int) -> dict[str, Any]:
    """Measures everything and returns it, ready for JSON."""
    load = os.getloadavg()[0]
    rounds = alternate(steps(overrides, batch), repeats)
    alone = alternate({"layer": one_layer(overrides, batch)}, repeats)["layer"]
    found: dict[str, Any] = {
        "machine": {"cpu": cpu_model(), "cores": usable_cores(), "load_average": load},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "batch": batch,
        "settings": {**DEIT_TINY, **overrides},
        "rounds": rounds,
        "layer": alone,
        "temporary_bytes_by_keys": temporaries(),
    }
    for kind in ("seconds", "cpu_seconds"):
        found[kind] = {step: _compared(rounds, step, kind) for step in RANKED}
    return found


def _compared(rounds: dict[str, dict[str, list[float]]], step: str, kind: str) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(rounds[step][kind], rounds["plain"][kind], strict=True))
    ratio = statistics.median(ratios)
    return {"ratio": ratio, "range": [ratios[0], ratios[-1]], "share_of_step": 1 - 1 / ratio}


def show(found: dict[str, Any]) -> None:
    """Prints a report."""
    machine = found["machine"]
    print(f"machine     {machine['cpu']}, {machine['cores']} cores; {found['device']};", end=" ")
    print(f"load average before the start: {machine['load_average']:.1f}")
    print(f"versions    python {found['python']}, jax {found['jax']}")
    for kind, name in (("seconds", "time"), ("cpu_seconds", "processor")):
        plain = 1e3 * statistics.median(found["rounds"]["plain"][kind])
        for step, x in found[kind].items():
            ranked = 1e3 * statistics.median(found["rounds"][step][kind])
            print(
                f"{name:11} step {plain:.0f} ms, with ranking of {step} {ranked:.0f} ms: {x['ratio']:.3f}"
                f" times ({x['range'][0]:.3f} to {x['range'][1]:.3f}), {100 * x['share_of_step']:.1f} % of"
                " the step"
            )
    own, processor = (1e3 * statistics.median(found["layer"][kind]) for kind in ("seconds", "cpu_seconds"))
    print(f"layer       its loss and gradient by themselves {own:.1f} ms, processor {processor:.1f} ms")
    for keys, size in found["temporary_bytes_by_keys"].items():
        print(f"{keys:4} keys   {size / 1e6:.2f} MB of temporaries, {size / (ROWS * keys):.1f} bytes a key")


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranking", description="Cost of ranking-aware distillation."
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of both models; repeatable"
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="batch size (8)")
    parser.add_argument("--repeats", type=int, default=9, metavar="K", help="rounds of each kind (9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args(argv)
    try:
        overrides = dict(map(parse_override, arguments.set))
        found = report(overrides, arguments.batch, arguments.repeats)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
