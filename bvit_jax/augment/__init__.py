"""Augmentation on the device: random erasing, mixup and cutmix, and normalisation.

Runs inside the training step, on batches of uint8 images that `bvit_jax.data` cropped and decoded. All
randomness comes from keys, and results do not depend on the number of devices. Crops, flips and RandAugment
run on the host, in `bvit_jax.data`.
"""

from typing import TYPE_CHECKING

from bvit_jax.imports import lazily

if TYPE_CHECKING:
    from bvit_jax.augment.augmentation import NO_AUGMENTATION, Augmentation
    from bvit_jax.augment.erasing import Erasing
    from bvit_jax.augment.mixing import Mixing, dominant_labels, mix_targets
    from bvit_jax.augment.normalization import Normalization

__all__ = [
    "NO_AUGMENTATION",
    "Augmentation",
    "Erasing",
    "Mixing",
    "Normalization",
    "dominant_labels",
    "mix_targets",
]

__getattr__ = lazily(__name__)
