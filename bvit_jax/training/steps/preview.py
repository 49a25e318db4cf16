"""The first images of a batch, as the training step presents them to the model."""

import jax.numpy as jnp
from flax import struct
from jax import Array

from bvit_jax.training.steps.batch import Batch, Inputs

COUNT = 32  # images


@struct.dataclass
class Seen:
    """The first images of a batch as the model sees them.

    Attributes:
      images: uint8 [n, H, W, 3].
      labels: int32 [n].
      partners: the labels that were mixed in, int32 [n].
      shares: of an image's own label, float32 [n]; 1 where nothing was mixed in.
    """

    images: Array
    labels: Array
    partners: Array
    shares: Array


def preview(inputs: Inputs, batch: Batch, step: Array, key: Array, *, count: int = COUNT) -> Seen:
    """Returns the first ``count`` images of a batch, or all, as a step sees them.

    They are augmented and normalised as in the step, and brought back to the scale from 0 to 255, beyond
    which values are clipped.

    Args:
      inputs: of the training step.
      batch: ``image``, uint8 [B, H, W, 3], and ``label``, int32 [B].
      step: number of steps taken before it.
      key: of training.
    """
    examples, _ = inputs.examples(batch, key, step)
    labels, lam = examples.labels, examples.lam
    restored = inputs.normalize.inverse(inputs.normalize(examples.pictures)[:count])
    shares = jnp.ones(labels.shape, jnp.float32) * (1 if lam is None else lam)
    return Seen(
        images=jnp.clip(jnp.round(restored), 0, 255).astype(jnp.uint8),
        labels=labels[:count],
        partners=labels[::-1][:count],
        shares=shares[:count],
    )
