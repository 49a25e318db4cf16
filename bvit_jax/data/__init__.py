"""From a prepared TFDS dataset to batches of uint8 images; knows nothing of models."""

from bvit_jax.data.pipeline import (
    Batch,
    eval_batches,
    open_eval_split,
    open_train_split,
    steps_per_epoch,
    train_augment,
    train_batches,
)
from bvit_jax.data.splits import Split, open_split

__all__ = [
    "Batch",
    "Split",
    "eval_batches",
    "open_eval_split",
    "open_split",
    "open_train_split",
    "steps_per_epoch",
    "train_augment",
    "train_batches",
]
