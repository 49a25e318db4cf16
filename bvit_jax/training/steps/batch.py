"""From a batch of uint8 images to the augmented examples of a step, the same in every program."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from bvit_jax.augment.augmentation import NO_AUGMENTATION, Augmentation
from bvit_jax.augment.normalization import Normalization
from bvit_jax.runtime.mesh import batch_sharded
from bvit_jax.training.steps.keys import MICROBATCHES_KEY, step_keys

Batch = Mapping[str, Array]


class Examples(NamedTuple):
    """The images of a step with their labels; the first axis of every array is the batch.

    Attributes:
      pictures: augmented, not normalised, on the scale from 0 to 255, [B, H, W, 3].
      labels: int32 [B].
      partners: the labels of the images that are mixed in, int32 [B]; None where nothing is mixed.
      lam: the images' own shares, float32 [B] or [1]; None where nothing is mixed.
    """

    pictures: Array
    labels: Array
    partners: Array | None
    lam: Array | None

    def microbatch(self, index: Array, count: int, mesh: Mesh | None) -> "Examples":
        """Returns every ``count``-th image, from ``index`` on.

        A device that holds consecutive images then holds its share of each microbatch, and no image moves.
        """

        def take(array: Array) -> Array:
            part = lax.dynamic_index_in_dim(
                array.reshape(-1, count, *array.shape[1:]), index, axis=1, keepdims=False
            )
            return part if mesh is None else lax.with_sharding_constraint(part, batch_sharded(mesh))

        whole = self
        if self.lam is not None:
            whole = self._replace(lam=jnp.broadcast_to(self.lam, self.labels.shape))
        return jax.tree.map(take, whole)


@dataclass(frozen=True)
class Inputs:
    """How images reach the student.

    Attributes:
      normalize: from images on the scale from 0 to 255 to the model's input.
      augmentation: on the device, before normalisation.
    """

    normalize: Normalization
    augmentation: Augmentation = NO_AUGMENTATION

    def examples(self, batch: Batch, key: Array, step: Array | int) -> tuple[Examples, Array]:
        """Returns the augmented examples of a step, and its key of dropout.

        Args:
          batch: ``image``, uint8 [B, H, W, 3], and ``label``, int32 [B].
          key: of training.
          step: number of steps taken before it.
        """
        step_key, augmentation_key = step_keys(key, step)
        pictures, lam = self.augmentation(augmentation_key, batch["image"], self.normalize)
        labels = batch["label"]
        return Examples(pictures, labels, None if lam is None else labels[::-1], lam), step_key

    def first_images(
        self, batch: Batch, key: Array, step: Array | int, count: int, mesh: Mesh | None
    ) -> tuple[Array, Array]:
        """Returns the normalised images that the model sees first in a step, and their key of dropout.

        These are all images, or those of the first of ``count`` microbatches.
        """
        examples, step_key = self.examples(batch, key, step)
        if count > 1:
            examples = examples.microbatch(jnp.int32(0), count, mesh)
            step_key = jax.random.fold_in(jax.random.fold_in(step_key, MICROBATCHES_KEY), 0)
        return self.normalize(examples.pictures), step_key
