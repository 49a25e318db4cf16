"""The evaluation step: sums over the images of a batch."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax.augment.normalization import Normalization
from bvit_jax.losses.classification import cross_entropy, label_targets, topk_correct
from bvit_jax.models.head import ModelOutput
from bvit_jax.training.steps.batch import Batch
from bvit_jax.training.steps.precision import DEFAULT


@dataclass(frozen=True)
class EvalSettings:
    """What an evaluation step is made of.

    Attributes:
      model: the model.
      normalize: from uint8 images to the model's input.
      images_at_once: if above 0 and a divisor of the batch, images go through the model in groups of this
        size, one after the other: a CPU keeps their activations in its caches.
      classes: those of the model that the labels number; None for all of them in their order.
      matmul_precision: of products of float32 numbers, see `bvit_jax.training.steps.precision`.
    """

    model: nn.Module
    normalize: Normalization
    images_at_once: int = 0
    classes: tuple[int, ...] | None = None
    matmul_precision: str = DEFAULT


def eval_step(settings: EvalSettings, variables: object, batch: Batch) -> dict[str, Array]:
    """Returns sums over the images that the mask keeps.

    Args:
      settings: of the step.
      variables: parameters and running statistics.
      batch: ``image``, uint8 [B, H, W, 3]; ``label``, int32 [B]; ``mask``, bool [B]; and ``bad``, int32 [B],
        -1 where the image could be decoded.

    Returns:
      Scalars: ``top1``, ``top5``, ``loss`` (cross-entropy with the labels) and the number of ``images``; and
      the number of ``bad_images``, which could not be decoded.
    """
    images, labels, mask = batch["image"], batch["label"], batch["mask"]
    group = settings.images_at_once
    if group and images.shape[0] % group == 0:
        groups = images.reshape(-1, group, *images.shape[1:])
        logits = jax.lax.map(partial(_logits, settings, variables), groups)
        logits = logits.reshape(images.shape[0], -1)
    else:
        logits = _logits(settings, variables, images)
    if settings.classes is not None:
        logits = logits[:, jnp.array(settings.classes)]
    targets = label_targets(labels, logits.shape[-1], 0.0, logits.dtype)

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(mask, values, 0), dtype=jnp.float32)

    return {
        "top1": total(topk_correct(logits, labels, 1)),
        "top5": total(topk_correct(logits, labels, 5)),
        "loss": total(cross_entropy(logits, targets)),
        "images": total(mask),
        "bad_images": jnp.sum(batch["bad"] >= 0),
    }


def _logits(settings: EvalSettings, variables: object, images: Array) -> Array:
    output: ModelOutput = settings.model.apply(variables, settings.normalize(images))  # type: ignore
    return output.logits
