"""Losses and accuracy as pure functions of logits, at least float32 inside."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def _at_least_float32(x: Array) -> Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def label_targets(labels: Array, num_classes: int, smoothing: float, dtype: Any) -> Array:
    """Returns smoothed one-hot targets [B, C] of integer labels [B].

    Every class receives ``smoothing / C`` and the label ``1 - smoothing`` more, as in timm: its
    ``mixup_target`` writes these values and its ``LabelSmoothingCrossEntropy`` is their
    cross-entropy.
    """
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=dtype)
    return (1 - smoothing) * one_hot + smoothing / num_classes


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Returns -Σ targets · log_softmax(logits) of each example: [B, C], [B, C] -> [B]."""
    log_probabilities = jax.nn.log_softmax(_at_least_float32(logits), axis=-1)
    return -jnp.sum(targets.astype(log_probabilities.dtype) * log_probabilities, axis=-1)


def soft_cross_entropy(logits: Array, target_logits: Array) -> Array:
    """Returns -Σ softmax(target) · log_softmax(logits) of each example: [B, C], [B, C] -> [B].

    The distillation loss of BinaryViT (``losses.py`` of its code), at temperature 1.
    """
    return cross_entropy(logits, jax.nn.softmax(_at_least_float32(target_logits), axis=-1))


def training_loss(
    logits: Array,
    labels: Array,
    teacher_logits: Array | None,
    *,
    distillation_weight: float,
    label_smoothing: float,
) -> tuple[Array, dict[str, Array]]:
    """Returns the batch mean of the loss and its unweighted terms.

    With a teacher the loss is ``w · distillation + (1 - w) · label``, and the label term is left
    out at w = 1; without one it is the label term alone.

    Args:
      logits: [B, C].
      labels: integers [B].
      teacher_logits: [B, C], or None for training on labels.
      distillation_weight: w, from 0 to 1.
      label_smoothing: see `label_targets`.

    Returns:
      A scalar, float32 or wider, and ``{"distillation_loss", "label_loss"}``, those computed.
    """
    terms: dict[str, Array] = {}
    weight = 0.0 if teacher_logits is None else distillation_weight
    if teacher_logits is not None:
        terms["distillation_loss"] = jnp.mean(soft_cross_entropy(logits, teacher_logits))
    if weight < 1:
        logits = _at_least_float32(logits)
        targets = label_targets(labels, logits.shape[-1], label_smoothing, logits.dtype)
        terms["label_loss"] = jnp.mean(cross_entropy(logits, targets))
    if len(terms) == 1:
        return next(iter(terms.values())), terms
    return weight * terms["distillation_loss"] + (1 - weight) * terms["label_loss"], terms


def topk_correct(logits: Array, labels: Array, k: int) -> Array:
    """Returns whether the label is among the k largest logits: [B, C], [B] -> bool [B].

    Among equal logits the lower class comes first. A NaN comes before every number, so that a
    diverged model is not counted as right. k above the number of classes means all of them.
    """
    classes = jnp.arange(logits.shape[-1])[None, :]
    own = labels[:, None].astype(classes.dtype)
    label_logits = jnp.take_along_axis(logits, own, axis=-1)
    # Negated comparisons, because every comparison with a NaN is false.
    not_below = ~(logits < label_logits)
    above = ~(logits <= label_logits)
    ahead = jnp.where(classes < own, not_below, above & (classes != own))
    return jnp.sum(ahead, axis=-1) < k
