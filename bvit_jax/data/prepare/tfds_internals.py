"""What preparation needs of TFDS beyond its public API, in one place.

The order of the records, the number and the bounds of the shards, and TFDS's builder of ImageNet. Tests
compare what they give with what TFDS writes.
"""

import tensorflow_datasets as tfds

try:
    from tensorflow_datasets.core.hashing import Hasher
    from tensorflow_datasets.core.utils.shard_utils import ShardConfig, get_shard_boundaries
    from tensorflow_datasets.datasets.imagenet2012.imagenet2012_dataset_builder import (
        CMYK_IMAGES,
        PNG_IMAGES,
    )
    from tensorflow_datasets.datasets.imagenet2012.imagenet2012_dataset_builder import (
        Builder as ImageNetBuilder,
    )
except ImportError as error:
    raise ImportError(
        f"tensorflow-datasets {tfds.__version__} has moved what bvit_jax.data.prepare imports; "
        "install version 4.9.10"
    ) from error

__all__ = ["CMYK_IMAGES", "PNG_IMAGES", "Hasher", "ImageNetBuilder", "ShardConfig", "get_shard_boundaries"]
