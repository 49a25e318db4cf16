"""Learning-rate schedules and the AdamW chain."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from bvit_jax.errors import UserError, nearest
from bvit_jax.optim.rules import Rule, factors, parse_rules

if TYPE_CHECKING:  # the optimiser also runs where ml-collections is not installed
    from ml_collections import ConfigDict

SCHEDULES = ("cosine", "cosine_by_epoch")


def make_schedule(
    optim: "ConfigDict", *, batch_size: int, steps_per_epoch: int, epochs: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the step, traceable.

    At epoch e, of E epochs with W of warm-up (timm's ``CosineLRScheduler``)::

        e < W:  warmup + e · (peak - warmup) / W
        e ≥ W:  min + (peak - min) · (1 + cos(π e / E)) / 2

    The clock of the cosine is not shifted by the warm-up, so the rate after warm-up starts a little
    below the peak. ``peak = learning_rate · batch_size / lr_scale_batch``; the minimum and the
    warm-up's start are absolute. With ``cosine``, e = step / steps_per_epoch is continuous; with
    ``cosine_by_epoch`` it is the whole epoch less one, at least 0: the schedule of the BinaryViT
    scripts, which step it before the first epoch and so train the first two at its first value.
    After the last epoch the rate stays at the minimum.

    Args:
      optim: the settings under ``config.optim``.
      batch_size: images of a step, over all devices.
      steps_per_epoch: steps of an epoch.
      epochs: E.

    Raises:
      UserError: values that exclude each other; names the key.
    """
    peak = optim.learning_rate * batch_size / optim.lr_scale_batch
    _check_schedule(optim, peak, epochs)
    low, start, warmup_epochs = (
        optim.min_learning_rate,
        optim.warmup_learning_rate,
        optim.warmup_epochs,
    )
    by_epoch = optim.schedule == "cosine_by_epoch"

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
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


def _check_schedule(optim: "ConfigDict", peak: float, epochs: int) -> None:
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


def decay_mask(params: Any) -> Any:
    """Returns the tree of ``params`` with True where weight decay applies.

    The rule of the PyTorch scripts: parameters of at most one dimension and those named ``bias``
    do not decay. Position embeddings [1, N, C] and the class token [1, 1, C] do.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim > 1 and name != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm of all arrays of a tree together, a scalar of their dtype.

    Squares of arrays of one shape are added up before they are summed. A model has a thousand small arrays
    of some thirty shapes, and a sum for each of them, as ``optax.tree.norm`` makes, is a thousand programs
    to compile and to load.
    """
    squares: dict[tuple[int, ...], list[jax.Array]] = {}
    for leaf in jax.tree.leaves(tree):
        squares.setdefault(leaf.shape, []).append(jnp.square(leaf))
    return jnp.sqrt(sum(jnp.sum(sum(same[1:], start=same[0])) for same in squares.values()))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns a transform that scales gradients by min(1, max_norm / (‖g‖ + 1e-6)).

    The formula of ``torch.nn.utils.clip_grad_norm_``; optax's own has no 1e-6.
    """

    def clip(gradients: Any, params: Any = None) -> Any:
        del params
        scale = jnp.minimum(max_norm / (global_norm(gradients) + 1e-6), 1)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)

    return optax.stateless(clip)


def make_optimizer(
    optim: "ConfigDict",
    schedule: optax.Schedule,
    mask: Any | Callable[[Any], Any] = decay_mask,
) -> optax.GradientTransformation:
    """Returns AdamW with decoupled weight decay, as ``torch.optim.AdamW`` computes it.

    The settings change what the transforms do, never the structure of their state, so that a run
    can be resumed with another weight decay, clipping or rules. Where a rule says so, a parameter has
    its own learning rate and weight decay, like a parameter group of PyTorch; what does not decay by the
    mask does not decay by a rule.

    Args:
      optim: the settings under ``config.optim``.
      schedule: the learning rate of each step.
      mask: tree of booleans like the parameters, or a function that makes one: where to decay.

    Raises:
      UserError: a rule is wrong; at ``init``, one matches no parameter.
    """
    rules = parse_rules(optim.rules)
    clip = clip_by_global_norm(optim.clip_grad_norm) if optim.clip_grad_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        _scale_by_rules(rules, optim.weight_decay, mask)
        if rules
        else optax.add_decayed_weights(optim.weight_decay, mask=mask),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_by_rules(
    rules: tuple[Rule, ...], weight_decay: float, mask: Any | Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Returns ``add_decayed_weights`` with the factors of rules, and its state."""

    def init(params: Any) -> optax.EmptyState:
        factors(rules, params)
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        rates, decays = factors(rules, params)
        where = mask(params) if callable(mask) else mask

        def scale(update: Any, param: Any, rate: float, decay: float, decayed: bool) -> Any:
            return rate * (update + weight_decay * decay * param if decayed else update)

        return jax.tree.map(scale, updates, params, rates, decays, where), state

    everywhere = partial(jax.tree.map, lambda _: True)
    return optax.masked(optax.GradientTransformation(init, update), everywhere)
