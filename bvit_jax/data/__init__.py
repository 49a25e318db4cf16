"""Input: batches of uint8 images from a prepared TFDS dataset, made on the host.

Opens splits for random access, decodes and transforms images with Pillow, and batches them with Grain, so
that a batch depends only on the seed and its number. Knows no models and puts nothing on devices.
Augmentation on the device is in `bvit_jax.augment`; `bvit_jax.data.prepare` writes datasets.
"""

from typing import TYPE_CHECKING

from bvit_jax.imports import lazily

if TYPE_CHECKING:
    from bvit_jax.data.pipeline import (
        Batch,
        eval_batches,
        open_eval_split,
        open_train_split,
        steps_per_epoch,
        train_augment,
        train_batches,
    )
    from bvit_jax.data.splits import Split, open_split, sample_digest

__all__ = [
    "Batch",
    "Split",
    "eval_batches",
    "open_eval_split",
    "open_split",
    "open_train_split",
    "sample_digest",
    "steps_per_epoch",
    "train_augment",
    "train_batches",
]

__getattr__ = lazily(__name__)
