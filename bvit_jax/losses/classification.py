"""Losses and accuracy as pure functions of logits, computed in float32 or wider."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

TeacherTargets = Literal["soft", "hard"]
Logits = Float[Array, "batch classes"]
Targets = Float[Array, "batch classes"]
Labels = Int[Array, " batch"]
Loss = Float[Array, ""]
ROUNDING = 1e-9  # by which weights that add up to 1 may miss it


def _at_least_float32(x: Array) -> Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def label_targets(labels: Labels, num_classes: int, smoothing: float, dtype: Any) -> Targets:
    """Returns smoothed one-hot targets.

    Every class gets ``smoothing / C``, and the label ``1 - smoothing`` in addition, as in timm's
    ``mixup_target``; timm's ``LabelSmoothingCrossEntropy`` is the cross-entropy with these targets.
    """
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=dtype)
    return (1 - smoothing) * one_hot + smoothing / num_classes


def cross_entropy(logits: Logits, targets: Targets) -> Float[Array, " batch"]:
    """Returns -Σ targets · log_softmax(logits) per example."""
    log_probabilities = jax.nn.log_softmax(_at_least_float32(logits), axis=-1)
    return -jnp.sum(targets.astype(log_probabilities.dtype) * log_probabilities, axis=-1)


def soft_cross_entropy(logits: Logits, target_logits: Logits) -> Float[Array, " batch"]:
    """Returns -Σ softmax(target) · log_softmax(logits) per example.

    The distillation loss of BinaryViT (``losses.py`` of its code), at temperature 1.
    """
    return cross_entropy(logits, jax.nn.softmax(_at_least_float32(target_logits), axis=-1))


def hard_cross_entropy(logits: Logits, target_logits: Logits) -> Float[Array, " batch"]:
    """Returns the cross-entropy with the class that the target prefers, per example.

    The hard distillation of DeiT (Touvron et al., 2021, section 4).
    """
    logits = _at_least_float32(logits)
    preferred = jnp.argmax(target_logits, axis=-1)
    return cross_entropy(logits, label_targets(preferred, logits.shape[-1], 0.0, logits.dtype))


def training_loss(
    head_logits: Sequence[Logits],
    labels: Labels,
    teacher_logits: Logits | None,
    *,
    distillation_weight: float,
    label_smoothing: float,
    teacher_targets: TeacherTargets = "soft",
    targets: Targets | None = None,
    other_weight: float | Loss = 0.0,
) -> tuple[Loss, dict[str, Loss]]:
    """Returns the batch mean of the loss, and its terms without their weights.

    With a teacher the loss is ``w · distillation + (1 - w - o) · label``; without a teacher it is
    ``(1 - o) · label``. A label term whose weight is always 0 is left out. The first head of the model learns
    from the labels, the last one from the teacher.

    Args:
      head_logits: of each head.
      labels: of the images.
      teacher_logits: None for training on labels.
      distillation_weight: w, from 0 to 1.
      label_smoothing: see `label_targets`.
      teacher_targets: "soft" for the teacher's probabilities, "hard" for its preferred class.
      targets: smoothed already, in place of ``labels``: what mixing images makes of them.
      other_weight: o, that of other terms of the loss, which the caller adds; it may depend on the step.

    Returns:
      The loss, float32 or wider, and those of ``{"distillation_loss", "label_loss"}`` that are computed.
    """
    terms: dict[str, Loss] = {}
    weight = 0.0 if teacher_logits is None else distillation_weight
    label_weight = 1 - weight - other_weight
    if teacher_logits is not None:
        distillation = soft_cross_entropy if teacher_targets == "soft" else hard_cross_entropy
        terms["distillation_loss"] = jnp.mean(distillation(head_logits[-1], teacher_logits))
    if not isinstance(label_weight, float) or label_weight > ROUNDING:
        logits = _at_least_float32(head_logits[0])
        if targets is None:
            targets = label_targets(labels, logits.shape[-1], label_smoothing, logits.dtype)
        terms["label_loss"] = jnp.mean(cross_entropy(logits, targets))
    weights = {"distillation_loss": weight, "label_loss": label_weight}
    weighted = [weights[name] * term for name, term in terms.items()]
    return sum(weighted[1:], weighted[0]), terms


def topk_correct(logits: Logits, labels: Labels, k: int) -> Bool[Array, " batch"]:
    """Returns whether the label is among the k largest logits.

    Among equal logits the lower class comes first. A NaN comes before every number, so a diverged model
    does not count as correct. A k above the number of classes means all of them.
    """
    classes = jnp.arange(logits.shape[-1])[None, :]
    own = labels[:, None].astype(classes.dtype)
    label_logits = jnp.take_along_axis(logits, own, axis=-1)
    # Negated comparisons, because every comparison with a NaN is false.
    not_below = ~(logits < label_logits)
    above = ~(logits <= label_logits)
    ahead = jnp.where(classes < own, not_below, above & (classes != own))
    return jnp.sum(ahead, axis=-1) < k
