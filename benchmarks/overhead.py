"""Measures what metrics and checkpoints cost, as a share of the training step.

    python -m benchmarks.overhead --model binaryvit --batch 8 --steps 20
    python -m benchmarks.overhead --config configs/digits.py --batch 64 --steps 100 --dir /tmp

Run it from the root of a checkout. Three kinds of rounds alternate: the steps alone;
the same steps with metrics that end in one line of the log, health of the binary layers included; and the
same with one checkpoint on the way. Steps are fed from memory, distilled from a teacher that costs nothing.

Two figures are given for each. The first is the time that the log, or the call that saves, takes once the
device is idle, at the intervals of a run (``--log-every`` and ``--checkpoint-every``). It is precise and
misses what happens between the steps. The second compares complete rounds, so that it counts everything, at
the interval of a round: make rounds longer than a checkpoint takes to write.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.jax_side import NORMALIZE, FixedTeacher, fixed_optimizer, model_of, random_batch
from benchmarks.workload import MODELS, Plan, known_model, parse_override
from bvit_jax.errors import UserError
from bvit_jax.models import create_model
from bvit_jax.report.machine import cpu_model
from bvit_jax.runtime.mesh import make_mesh, replicated
from bvit_jax.training.steps import health
from bvit_jax.training.steps.batch import Inputs
from bvit_jax.training.steps.programs import jit_health, jit_train_step
from bvit_jax.training.steps.state import TrainState, create_state
from bvit_jax.training.steps.train import Objective, TrainSettings
from bvit_jax.workdir.checkpoint import Checkpoints
from bvit_jax.workdir.metrics import MetricWindow, MetricWriter

IMAGENET = 1_281_167
LOG, SAVE = "log", "checkpoint"
Seconds = dict[str, list[float]]


class Program:
    """A compiled training step with its metrics and checkpoints."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        settings, dtype = model_of(plan)
        model: Any = create_model(settings, dtype)
        mesh = make_mesh()
        if plan.batch % mesh.size:
            raise UserError(f"--batch is {plan.batch}; expected a multiple of the {mesh.size} devices")
        optimizer, everywhere = fixed_optimizer(), replicated(mesh)
        teacher = FixedTeacher(plan.batch, model.num_classes)
        inputs = Inputs(NORMALIZE)
        training = TrainSettings(model, optimizer, inputs, Objective(teacher))
        create = functools.partial(
            create_state, model=model, optimizer=optimizer, image_size=model.image_size, health=True
        )
        self._key = jax.device_put(jax.random.key(0), everywhere)
        self._batch = random_batch(plan.batch, model, mesh)
        self._teacher = jax.device_put(teacher.init(self._key, self._batch["image"]), everywhere)
        self._state: TrainState = jax.jit(create, out_shardings=everywhere)(self._key)
        self._step = jit_train_step(training, mesh)
        self._health = jit_health(model, inputs, 1, mesh)
        self._writer, self._window = MetricWriter(directory, active=True), MetricWindow()
        self._checkpoints = Checkpoints(directory, keep=2)
        self._count = 0

    def round(self, steps: int, event: str | None = None) -> tuple[float, float]:
        """Returns the seconds that ``steps`` steps took and those of the event that came with them."""
        took, metrics = 0.0, None
        began = time.perf_counter()
        for i in range(1, steps + 1):
            self._state, metrics = self._step(self._state, self._batch, self._teacher, self._key)
            self._count += 1
            if event is not None:
                self._window.add(self._count, metrics)
            if event == LOG and i == steps:
                took = _timed_when_idle(metrics, self._log)
            if event == SAVE and i == (steps + 1) // 2:
                took = _timed_when_idle(metrics, self._save)
        jax.block_until_ready(metrics)
        return time.perf_counter() - began, took

    def close(self) -> None:
        """Waits for what is still being written."""
        self._checkpoints.close()
        self._writer.close()

    def _log(self) -> None:
        figures, signs = self._health(self._state, self._batch, self._key)
        self._state = self._state.replace(signs=signs)
        means = self._window.mean()
        layers = health.per_layer(figures)
        self._writer.write(self._count, means | health.totals(layers))
        self._writer.write_layers(self._count, layers)
        self._window.reset()

    def _save(self) -> None:
        self._checkpoints.save(self._count, self._state, {"window": self._window.state()})


def _timed_when_idle(pending: Any, call: Callable[[], None]) -> float:
    jax.block_until_ready(pending)
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(program: Program, steps: int, repeats: int) -> tuple[Seconds, Seconds]:
    """Returns the seconds of every round of each kind, and those of the events in them."""
    kinds = {"steps": None, LOG: LOG, SAVE: SAVE}
    for event in kinds.values():  # compiles, and makes directories
        program.round(2, event)
    rounds: Seconds = {kind: [] for kind in kinds}
    events: Seconds = {LOG: [], SAVE: []}
    for _ in range(repeats):
        for kind, event in kinds.items():
            seconds, took = program.round(steps, event)
            rounds[kind].append(seconds)
            if event is not None:
                events[event].append(took)
    return rounds, events


def report(
    plan: Plan, steps: int, intervals: dict[str, int], rounds: Seconds, events: Seconds
) -> dict[str, Any]:
    """Returns the medians, and the shares of the step at the intervals of a run."""
    step = statistics.median(rounds["steps"]) / steps
    found: dict[str, Any] = {
        "model": plan.model or plan.config,
        "batch": plan.batch,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "steps_per_round": steps,
        "rounds": len(rounds["steps"]),
        "step_seconds": step,
    }
    for event, interval in intervals.items():
        ratios = sorted(a / b for a, b in zip(rounds[event], rounds["steps"], strict=True))
        seconds = statistics.median(events[event])
        found[event] = {
            "seconds": seconds,
            "every_steps": interval,
            "share": seconds / (interval * step),
            "rounds_ratio": statistics.median(ratios),
            "rounds_ratio_range": [ratios[0], ratios[-1]],
        }
    return found


def show(found: dict[str, Any]) -> None:
    """Prints a report."""
    print(f"machine     {found['cpu']}; {found['device']}")
    print(f"versions    python {found['python']}, jax {found['jax']}")
    print(f"{found['model']}, batch {found['batch']}: step {1e3 * found['step_seconds']:.1f} ms")
    for event in (LOG, SAVE):
        x = found[event]
        low, high = x["rounds_ratio_range"]
        print(
            f"{event:11} {1e3 * x['seconds']:.1f} ms, {100 * x['share']:.3f} % of the time at every"
            f" {x['every_steps']} steps; rounds of {found['steps_per_round']} steps with one take"
            f" {x['rounds_ratio']:.3f} ({low:.3f} to {high:.3f}) times those without"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description="Cost of metrics and checkpoints."
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--model", metavar="NAME", help=", ".join(MODELS))
    group.add_argument("--config", metavar="FILE[:ARG]", help="an experiment, for its model")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the model; repeatable"
    )
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="batch size (16)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps of a round (20)")
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="rounds of each kind (5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(the config's, or float32)")
    parser.add_argument("--log-every", type=int, default=100, metavar="N", help="steps (100)")
    parser.add_argument(
        "--checkpoint-every", type=int, default=0, metavar="N", help="steps (an epoch of ImageNet)"
    )
    parser.add_argument("--dir", metavar="DIR", help="where to write, a directory is made in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args(argv)
    try:
        overrides = dict(map(parse_override, arguments.set))
        if arguments.model:
            known_model(arguments.model)
        plan = Plan(
            arguments.model, arguments.config, overrides, arguments.batch, arguments.dtype, None, False
        )
        intervals = {
            LOG: arguments.log_every,
            SAVE: arguments.checkpoint_every or IMAGENET // arguments.batch,
        }
        with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
            program = Program(plan, Path(directory))
            try:
                rounds, events = measure(program, arguments.steps, arguments.repeats)
            finally:
                program.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = report(plan, arguments.steps, intervals, rounds, events)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
