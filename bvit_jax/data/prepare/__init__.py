"""Writes TFDS data sets as ArrayRecord, without TensorFlow: ``python -m bvit_jax.data.prepare``

A data set is a `Source`: splits made of parts, parts made of examples. `prepare` writes it so that its
records, their order and its shards are those of TFDS, that it can be killed at any time and continues,
and that it appears complete or not at all. Imports nothing of the rest of bvit_jax but `data.splits`,
`data.progress` and `errors`.

Why not a TFDS builder? `GeneratorBasedBuilder` keeps a split in memory up to 1,000 MiB; beyond that its
shuffler writes through ``tf.io.gfile``, so that ImageNet cannot be prepared without TensorFlow (a test
checks that this is still so). `ShardBasedBuilder` does without, but takes the records in their final order
and, like every builder, deletes all it has written when it fails, so that nothing can be continued.
"""

from bvit_jax.data.prepare.shuffle import prepare
from bvit_jax.data.prepare.source import Part, Source, SplitSource

__all__ = ["Part", "Source", "SplitSource", "prepare"]
