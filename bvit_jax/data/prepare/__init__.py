"""Writes TFDS data sets as ArrayRecord, without TensorFlow: ``python -m bvit_jax.data.prepare``"""

from bvit_jax.data.prepare.shuffle import prepare
from bvit_jax.data.prepare.source import Part, Source, SplitSource

__all__ = ["Part", "Source", "SplitSource", "prepare"]
