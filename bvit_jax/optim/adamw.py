"""AdamW as PyTorch computes it, with PyTorch's gradient clipping and rules for single parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Float, PyTree

from bvit_jax.optim.rules import Rule, factors, parse_rules


def decay_mask(params: PyTree) -> PyTree[bool]:
    """Returns a tree like ``params``, True where weight decay applies.

    As in the PyTorch scripts, parameters of at most one dimension and those named ``bias`` do not
    decay; position embeddings [1, N, C] and the class token [1, 1, C] do.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim > 1 and name != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def global_norm(tree: PyTree[Float[Array, "..."]]) -> Float[Array, ""]:
    """Returns the Euclidean norm of all arrays of a tree together, in their dtype.

    The squares of arrays of equal shape are added before they are summed. A model has a thousand small
    arrays of about thirty shapes; one sum per array, as in ``optax.tree.norm``, means a thousand kernels
    to compile and load.
    """
    squares: dict[tuple[int, ...], list[Array]] = {}
    for leaf in jax.tree.leaves(tree):
        squares.setdefault(leaf.shape, []).append(jnp.square(leaf))
    return jnp.sqrt(sum(jnp.sum(sum(same[1:], start=same[0])) for same in squares.values()))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns a transform that scales gradients by min(1, max_norm / (‖g‖ + 1e-6)).

    The formula of ``torch.nn.utils.clip_grad_norm_``; that of optax lacks the 1e-6.
    """

    def clip(gradients: PyTree, params: PyTree = None) -> PyTree:
        del params
        scale = jnp.minimum(max_norm / (global_norm(gradients) + 1e-6), 1)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)

    return optax.stateless(clip)


def make_optimizer(
    optim: Any, schedule: optax.Schedule, mask: PyTree[bool] | Callable[[PyTree], PyTree[bool]] = decay_mask
) -> optax.GradientTransformation:
    """Returns AdamW with decoupled weight decay, as ``torch.optim.AdamW`` computes it.

    The settings change what the transforms do but never the structure of their state, so a run can be
    resumed with a different weight decay, clipping or rules. Rules give parameters their own learning
    rate and weight decay, like a parameter group in PyTorch; they do not make parameters decay that the
    mask excludes.

    Args:
      optim: the settings of ``config.optim``.
      schedule: the learning rate as a function of the step.
      mask: where to decay: a tree of booleans like the parameters, or a function that returns one.

    Raises:
      UserError: a rule is wrong; at ``init``, one matches no parameter.
    """
    rules = parse_rules(optim.rules)
    clip = clip_by_global_norm(optim.clip_grad_norm) if optim.clip_grad_norm else optax.identity()
    return optax.chain(
        clip,
        _scale_by_adam(optim.b1, optim.b2, optim.eps),
        _scale_by_rules(rules, optim.weight_decay, mask)
        if rules
        else optax.add_decayed_weights(optim.weight_decay, mask=mask),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns ``optax.scale_by_adam``, of the same state, in three quarters of its operations.

    A model has a thousand parameters, so that half of a training step's program is this update. Bias is
    corrected by two scalars, ``m / (1 - b1^t)`` and ``√v / √(1 - b2^t)``, as PyTorch does.
    """

    def update(
        gradients: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: m + (1 - b1) * (g - m), state.mu, gradients)
        nu = jax.tree.map(lambda v, g: v + (1 - b2) * (g * g - v), state.nu, gradients)
        steps = count.astype(jnp.result_type(*jax.tree.leaves(nu)))
        of_mean, of_root = 1 / (1 - b1**steps), lax.rsqrt(1 - b2**steps)
        updates = jax.tree.map(lambda m, v: of_mean * m / (of_root * jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def _scale_by_rules(
    rules: tuple[Rule, ...], weight_decay: float, mask: PyTree[bool] | Callable[[PyTree], PyTree[bool]]
) -> optax.GradientTransformation:
    """Returns ``add_decayed_weights`` with the factors of rules; its state has the same structure."""

    def init(params: Any) -> optax.EmptyState:
        factors(rules, params)
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        rates, decays = factors(rules, params)
        where = mask(params) if callable(mask) else mask

        def scale(update: Any, param: Any, rate: float, decay: float, decayed: bool) -> Any:
            return rate * (update + weight_decay * decay * param if decayed else update)

        return jax.tree.map(scale, updates, params, rates, decays, where), state

    # add_decayed_weights with a mask has the state MaskedState(EmptyState()). Masking nothing gives the same,
    # so that a checkpoint made without rules can be continued with them, and the other way round.
    everywhere = partial(jax.tree.map, lambda _: True)
    return optax.masked(optax.GradientTransformation(init, update), everywhere)
