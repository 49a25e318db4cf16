"""Learning-rate schedules."""

import math
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Integer

from bvit_jax.errors import UserError, nearest

SCHEDULES = ("cosine", "cosine_by_epoch")


def make_schedule(optim: Any, *, batch_size: int, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, which may be traced.

    At epoch e, of E epochs with W of warm-up (timm's ``CosineLRScheduler``)::

        e < W:  warmup + e · (peak - warmup) / W
        e ≥ W:  min + (peak - min) · (1 + cos(π e / E)) / 2

    Warm-up does not shift the cosine, so the rate after it starts slightly below the peak, which is
    ``learning_rate · batch_size / lr_scale_batch``; the minimum and the start of the warm-up do not
    scale. With ``cosine``, e = step / steps_per_epoch is continuous. With ``cosine_by_epoch``, e is
    the number of finished epochs minus one, at least 0, as in the BinaryViT scripts, which advance
    their schedule before the first epoch and so train the first two epochs at its first value.
    After the last epoch the rate stays at the minimum.

    Args:
      optim: the settings of ``config.optim``.
      batch_size: images per step, over all devices.
      steps_per_epoch: steps per epoch.
      epochs: E.

    Raises:
      UserError: settings that conflict; names the key.
    """
    peak = optim.learning_rate * batch_size / optim.lr_scale_batch
    _check_schedule(optim, peak, epochs)
    low, start, warmup_epochs = (
        optim.min_learning_rate,
        optim.warmup_learning_rate,
        optim.warmup_epochs,
    )
    by_epoch = optim.schedule == "cosine_by_epoch"

    def schedule(step: int | Integer[Array, "..."]) -> Float[Array, "..."]:
        step = jnp.asarray(step)
        if by_epoch:
            epoch = jnp.maximum(step // steps_per_epoch - 1, 0).astype(float)
        else:
            epoch = step.astype(float) / steps_per_epoch
        epoch = jnp.minimum(epoch, epochs)
        rate = low + 0.5 * (peak - low) * (1 + jnp.cos(math.pi * epoch / epochs))
        if not warmup_epochs:
            return rate
        warmup = start + epoch * ((peak - start) / warmup_epochs)
        return jnp.where(epoch < warmup_epochs, warmup, rate)

    return schedule


def _check_schedule(optim: Any, peak: float, epochs: int) -> None:
    if optim.schedule not in SCHEDULES:
        raise UserError(
            f"config.optim.schedule is {optim.schedule!r}, unknown" + nearest(str(optim.schedule), SCHEDULES)
        )
    if optim.warmup_epochs >= epochs:
        raise UserError(
            f"config.optim.warmup_epochs is {optim.warmup_epochs}; expected fewer than the"
            f" {epochs} epochs of the run (config.epochs)"
        )
    for key in ("min_learning_rate", "warmup_learning_rate"):
        used = key == "min_learning_rate" or optim.warmup_epochs
        if used and optim[key] > peak:
            raise UserError(
                f"config.optim.{key} is {optim[key]:g}, above the peak of {peak:g} ="
                " learning_rate * batch_size / lr_scale_batch; lower it or raise the peak"
            )
