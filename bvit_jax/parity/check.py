"""Our model on a golden file, group by group: outputs, gradients, statistics, optimiser steps.

Errors of a gradient are relative to at least 1e-4 of the largest gradient in the file, and 1e-3 where it
vanishes by cancellation: that of a shift in front of a batch norm, which leaves 1e-17 on both sides. Errors
of a running mean are relative to at least its standard deviation, by which the batch norm divides it.
"""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bvit_jax import models, optim
from bvit_jax.config import default_config
from bvit_jax.errors import UserError
from bvit_jax.layers.first_values import SEEN, first_batch
from bvit_jax.parity import merging
from bvit_jax.parity.golden import Arrays, GoldenFile, Row, compare
from bvit_jax.parity.subject import Loss, Subject, subject_of
from bvit_jax.weights.naming import REFERENCE
from bvit_jax.weights.state_dicts import Variables, abstract_variables, from_state_dict, to_state_dict

GRADIENT_FLOOR, CANCELLED_FLOOR = 1e-4, 1e-3  # of the largest gradient
CANCELLED = 1e-13  # of the largest gradient: below it there is only noise
COUNTER = ".num_batches_tracked"


def check(path: Path) -> Iterator[Row]:
    """Runs our model on a golden file in float64 and yields one row per group, as each is done.

    Raises:
      UserError: the file cannot be read, or holds a model or state dict that does not fit.
    """
    golden = GoldenFile(path)
    if golden.meta.get("case") == merging.CASE:
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            yield from merging.check(golden)
        return
    subject = subject_of(golden.meta)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield from _check_model(golden, subject)


def _check_model(golden: GoldenFile, subject: Subject) -> Iterator[Row]:
    config = subject.config
    model = models.create_model(config, jnp.float64)
    abstract = abstract_variables(model, config.image_size)
    size = (config.image_size, config.image_size, 3)
    if golden.images().shape[1:] != size:
        raise UserError(f"its images are {golden.images().shape[1:]}; its model takes {size}")
    naming = subject.file_format.naming(config)
    variables = from_state_dict(golden.group("state"), abstract, np.float64, naming)
    yield _compare_inputs(golden, subject)
    initial = variables
    if "init/eval_logits" in golden.arrays:  # of a model that has seen no batch
        output = _forward(model, variables, golden.images())
        yield compare("untrained logits", {"": output.logits}, {"": golden.array("init/eval_logits")})
    if golden.group("init_state"):
        output, variables = jax.jit(functools.partial(first_batch, model))(variables, golden.images())
        yield compare("first logits", {"": output.head_logits[0]}, {"": golden.array("init/logits")})
        statistics = _train(golden, subject, model, variables)[0][1][1]
        state = to_state_dict({"params": variables["params"], "batch_stats": statistics}, naming)
        yield merging.compare_first_state(golden, state)
        variables = from_state_dict(state | golden.group("state2"), abstract, np.float64, naming)

    output = _forward(model, variables, golden.images())
    yield compare("eval logits", {"": output.logits}, {"": golden.array("eval/logits")})
    for group, ours in (("hidden", output.hidden_states), ("attention", output.attentions)):
        if theirs := golden.group(f"eval/{group}"):
            # Files may leave out the large arrays.
            named = {str(i): array for i, array in enumerate(ours) if str(i) in theirs}
            yield compare(f"eval {group}", named, theirs)

    yield from _check_training(golden, subject, model, variables)
    if "steps/lr" in golden.arrays:
        yield from _check_steps(golden, subject, model, initial)


def _compare_inputs(golden: GoldenFile, subject: Subject) -> Row:
    """Checks what the format promises: ``weights_dtype`` holds weights and inputs exactly.

    Some parameters, such as the bias of a key, affect nothing that is computed, so that only this check
    finds damage to them. The constants among the buffers must equal those that our model computes with.
    """
    theirs = {f"state/{name}": array for name, array in golden.group("state").items()}
    theirs |= {f"input/{name}": array for name, array in golden.group("input").items()}
    weights_dtype = golden.meta.get("weights_dtype", "float16")
    if weights_dtype not in ("float16", "float32", "float64"):
        raise UserError(f"its weights_dtype is {weights_dtype!r}; expected float16, float32 or float64")
    ours = {
        name: array.astype(weights_dtype).astype(array.dtype)
        for name, array in theirs.items()
        if array.dtype.kind == "f"
    }
    naming = subject.file_format.naming(subject.config)
    constants = subject.file_format.constants(subject.config, golden.group("state"))
    for name, array in theirs.items():
        bare = name.removeprefix("state/")
        constant = constants.get(bare)
        if constant is not None and not name.endswith(COUNTER) and not naming.is_unused(bare):
            ours[name] = constant
        elif name not in ours:  # counters, labels
            ours[name] = np.asarray(array)
    return compare("inputs", ours, theirs)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: nn.Module, variables: Variables, images: Any) -> Any:
    return model.apply(variables, images, capture=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss_and_gradients(model: nn.Module, loss_of: Loss, *batch: Any) -> Any:
    return jax.value_and_grad(_loss(model, loss_of), argnums=(0, 1), has_aux=True)(*batch)


def _loss(model: nn.Module, loss_of: Loss) -> Callable[..., Any]:
    """Returns the training loss as a function of (params, images, statistics, targets)."""

    def loss(params: Any, images: Any, statistics: Any, targets: Any) -> tuple[Any, Any]:
        output, updates = model.apply(
            {"params": params, "batch_stats": statistics}, images, train=True, mutable=["batch_stats"]
        )
        return loss_of(output, targets, params), (output.head_logits, updates.get("batch_stats", {}))

    return loss


def _targets(golden: GoldenFile, group: str = "input") -> Arrays:
    targets = {"teacher_logits": golden.float64(f"{group}/teacher_logits")}
    if f"{group}/labels" in golden.arrays:
        targets["labels"] = golden.array(f"{group}/labels")
    return targets


def _check_training(
    golden: GoldenFile, subject: Subject, model: nn.Module, variables: Variables
) -> Iterator[Row]:
    naming = subject.file_format.naming(subject.config)
    (loss, (logits, statistics)), (to_params, to_images) = _train(golden, subject, model, variables)
    if theirs := golden.group("train/logits"):  # of each head
        yield compare("train logits", {str(i): head for i, head in enumerate(logits)}, theirs)
    else:
        yield compare("train logits", {"": logits[0]}, {"": golden.array("train/logits")})
    if "init/logits" in golden.arrays and not golden.group("init_state"):
        yield compare("first logits", {"": logits[0]}, {"": golden.array("init/logits")})
    yield compare("loss", {"": loss}, {"": golden.array("train/loss")})
    if theirs := golden.group("grad"):
        ours = to_state_dict({"params": to_params}, naming)
        yield compare("gradients", ours, theirs, _gradient_floors(theirs))
    if theirs := golden.group("grad_input"):
        yield compare("input gradient", {"images": np.moveaxis(to_images, -1, -3)}, theirs)
    if theirs := golden.group("train_state"):
        ours = to_state_dict({"batch_stats": statistics}, naming) | _buffers(golden, theirs, steps=1)
        ours = {name: a for name, a in ours.items() if not name.endswith(SEEN) or name in theirs}
        yield compare("running statistics", ours, theirs, _deviations(theirs))


def _train(golden: GoldenFile, subject: Subject, model: nn.Module, variables: Variables) -> Any:
    """Returns ((loss, (logits, statistics)), gradients of parameters and images) of a training step."""
    batch = variables["params"], golden.images(), variables.get("batch_stats", {}), _targets(golden)
    return _loss_and_gradients(model, subject.loss, *batch)


def _magnitudes(arrays: Arrays) -> dict[str, float]:
    return {name: float(np.max(np.abs(array), initial=0)) for name, array in arrays.items()}


def _buffers(golden: GoldenFile, expected: Arrays, steps: int) -> Arrays:
    """Returns the ``expected`` arrays that are PyTorch's buffers, as they are ``steps`` batches later."""
    return {
        name: array + steps if name.endswith(COUNTER) else array
        for name, array in golden.group("state").items()
        if name in expected and REFERENCE.is_bookkeeping(name)
    }


def _check_steps(
    golden: GoldenFile, subject: Subject, model: nn.Module, variables: Variables
) -> Iterator[Row]:
    settings = default_config().optim
    try:
        described = golden.meta["optimizer"]
        settings.b1, settings.b2 = described["betas"]
        settings.eps, settings.weight_decay = described["eps"], described["weight_decay"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"its meta does not describe the optimizer: {error!r}") from error
    rates = golden.float64("steps/lr")
    optimizer = optim.make_optimizer(settings, lambda step: jnp.asarray(rates)[step])
    gradient = jax.value_and_grad(_loss(model, subject.loss), has_aux=True)

    @jax.jit
    def step(params: Any, statistics: Any, state: Any, images: Any, targets: Any) -> tuple:
        (loss, (_, statistics)), grads = gradient(params, images, statistics, targets)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state, loss

    batches, targets_of = golden.images("steps/images"), _targets(golden, "steps")
    if golden.group("init_state"):
        _, variables = jax.jit(functools.partial(first_batch, model))(variables, batches[0])
    params, statistics = variables["params"], variables.get("batch_stats", {})
    state, steps = optimizer.init(params), []
    for number, images in enumerate(batches):
        targets = {name: array[number] for name, array in targets_of.items()}
        params, statistics, state, loss = step(params, statistics, state, images, targets)
        steps.append(loss)
    yield compare("step losses", {"": np.array(steps)}, {"": golden.array("steps/loss")})
    theirs = golden.group("steps/final")
    naming = subject.file_format.naming(subject.config)
    ours = to_state_dict({"params": params, "batch_stats": statistics}, naming)
    ours |= _buffers(golden, theirs, len(steps))
    floors = _deviations(theirs) | _final_floors(golden, rates.sum() / settings.eps)
    yield compare("final state", ours, theirs, floors)


def _gradient_floors(gradients: Arrays) -> dict[str, float]:
    """Returns the smallest scales for gradients: more for those that vanish by cancellation."""
    magnitudes = _magnitudes(gradients)
    largest = max(magnitudes.values())
    return {
        name: largest * (CANCELLED_FLOOR if magnitude < CANCELLED * largest else GRADIENT_FLOOR)
        for name, magnitude in magnitudes.items()
    }


def _deviations(statistics: Arrays) -> dict[str, float]:
    """Returns the smallest scales for running means: the largest standard deviation in each."""
    return {
        name: float(np.sqrt(np.max(np.abs(statistics[variance]), initial=0)))
        for name in statistics
        if (variance := re.sub(r"running_mean$", "running_var", name)) != name and variance in statistics
    }


def _final_floors(golden: GoldenFile, amplification: float) -> dict[str, float]:
    """Returns the smallest scales for final parameters whose gradient is zero by cancellation.

    Such a gradient is nothing but rounding noise on either side, which Adam's normaliser amplifies by up to
    the sum of the learning rates over epsilon. The allowed difference is that of the gradients, amplified.
    """
    gradients = _magnitudes(golden.group("grad"))
    largest = max(gradients.values(), default=0.0)
    return {
        name: GRADIENT_FLOOR * largest * amplification
        for name, gradient in gradients.items()
        if gradient < CANCELLED * largest
    }
