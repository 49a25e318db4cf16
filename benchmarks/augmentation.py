"""Measures what erasing and mixing on the device cost, as a share of the training step.

    python -m benchmarks.augmentation --model deit_small --model binaryvit --batch 16

Run it from the root of a checkout. The augmentation is DeiT's: random erasing 0.25
in pixel mode, mixup 0.8, cutmix 1.0. Compiled on its own, with the normalisation and the targets that
follow, it is measured in turn with the same without augmentation; the difference is its cost, and the
step next to them is the one without it. Differences between complete steps would drown in the noise.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.jax_side import NORMALIZE, JaxSide
from benchmarks.workload import MODELS, WARMUP_STEPS, Plan, known_model, parse_override
from bvit_jax.augment.augmentation import Augmentation
from bvit_jax.augment.erasing import Erasing
from bvit_jax.augment.mixing import Mixing, mix_targets
from bvit_jax.errors import UserError
from bvit_jax.losses.classification import label_targets
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated

DEIT = Augmentation(Erasing(prob=0.25), Mixing(mixup_alpha=0.8, cutmix_alpha=1.0))
SMOOTHING = 0.1
CALLS = 5  # of the augmentation, in each round


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.augmentation", description="Cost of augmentation on the device."
    )
    parser.add_argument(
        "--model", action="append", required=True, metavar="NAME", help=f"{', '.join(MODELS)}; repeatable"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the models; repeatable"
    )
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="batch size (16)")
    parser.add_argument("--repeats", type=int, default=5, metavar="K", help="rounds (5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args(argv)
    try:
        for name in arguments.model:
            known_model(name)
        for name in arguments.model:
            overrides = dict(map(parse_override, arguments.set))
            plan = Plan(
                name, None, overrides, arguments.batch, arguments.dtype, None, False, kinds=("training",)
            )
            print(line(name, *measure(plan, arguments.repeats)), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(plan: Plan, repeats: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of a step and those that augmentation adds to it, of each round."""
    side = JaxSide(plan)
    side.compile()
    size, classes = (side.facts.settings[key] for key in ("image_size", "num_classes"))
    augmented, plain = (_compiled(function, plan.batch, size, classes) for function in (_augmented, _plain))
    for _ in range(WARMUP_STEPS):
        for call in (lambda: side.step("training"), augmented, plain):
            call()
    steps, costs = [], []
    for _ in range(repeats):
        with_, without = (_seconds(call, CALLS) for call in (augmented, plain))
        costs.append(with_ - without)
        steps.append(_seconds(lambda: side.step("training"), 1))
    return steps, costs


def line(name: str, steps: list[float], costs: list[float]) -> str:
    """Returns the medians, and the share of the step that augmentation would cost."""
    step, cost = statistics.median(steps), statistics.median(costs)
    ranges = [f"{1e3 * min(values):.1f} to {1e3 * max(values):.1f}" for values in (steps, costs)]
    return (
        f"{name}: step {1e3 * step:.1f} ms ({ranges[0]}), augmentation {1e3 * cost:.2f} ms ({ranges[1]}),"
        f" {100 * cost / step:.2f} % of the step"
    )


def _augmented(key: Array, images: Array, labels: Array, classes: int) -> tuple[Array, Array]:
    pictures, lam = DEIT(key, images, NORMALIZE)
    assert lam is not None
    return NORMALIZE(pictures), mix_targets(labels, lam, classes, SMOOTHING)


def _plain(key: Array, images: Array, labels: Array, classes: int) -> tuple[Array, Array]:
    return NORMALIZE(images), label_targets(labels, classes, SMOOTHING, jnp.float32)


def _compiled(function: Callable[..., Any], batch: int, size: int, classes: int) -> Callable[[], Any]:
    """Returns a call of the function on random images, on all devices, that waits for its result."""
    mesh = make_mesh()
    everywhere, sharded = replicated(mesh), batch_sharded(mesh)
    generator = np.random.default_rng(0)
    images = jax.device_put(generator.integers(0, 256, (batch, size, size, 3), np.uint8), sharded)
    labels = jax.device_put(generator.integers(0, classes, batch, np.int32), sharded)
    key = jax.device_put(jax.random.key(0), everywhere)
    jitted = jax.jit(
        function, static_argnums=3, in_shardings=(everywhere, sharded, sharded), out_shardings=sharded
    )
    return lambda: jax.block_until_ready(jitted(key, images, labels, classes))


def _seconds(call: Callable[[], Any], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    sys.exit(main())
