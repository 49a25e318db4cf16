"""Augmentation of a batch inside the training step: erasing, then mixing."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Key, Num, UInt8

from bvit_jax.augment.erasing import Erasing
from bvit_jax.augment.mixing import Mixing, mix_images
from bvit_jax.augment.normalization import Normalization


@dataclass(frozen=True)
class Augmentation:
    """The part of a recipe that runs on the device."""

    erasing: Erasing
    mixing: Mixing

    def __call__(
        self, key: Key[Array, ""], images: UInt8[Array, "batch height width 3"], normalize: Normalization
    ) -> tuple[Num[Array, "batch height width 3"], Float32[Array, " n"] | None]:
        """Augments images before normalisation, so that a teacher with other means sees the same images.

        ``normalize`` is the student's, which defines the unit of the noise of erasing.

        Returns:
          The images, float32 from 0 to 255 if anything is on, and the share of its own pixels and label
          that each image keeps, one for all or one each, or None if nothing is mixed.
        """
        key_erase, key_mix = jax.random.split(key)
        partners = images[::-1]
        if self.erasing.prob:
            keys = jax.random.split(key_erase, images.shape[0])
            # Erasing the partners again gives the same result, and devices exchange uint8, not float32.
            partners = self.erasing(keys[::-1], partners, normalize)
            images = self.erasing(keys, images, normalize)
        if not self.mixing.active:
            return images, None
        mix = self.mixing.draw(key_mix, *images.shape[:3])
        return mix_images(images.astype(jnp.float32), partners.astype(jnp.float32), mix), mix.lam


NO_AUGMENTATION = Augmentation(Erasing(), Mixing())
