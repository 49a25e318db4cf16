"""A rehearsal of ImageNet training: the full recipes on a generated data set with ImageNet's shape.

Command: python -m bvit_jax.data.mini_imagenet --out mini
  bvit prepare imagenet2012 --tars mini --expect train=2000,validation=500 --data_dir mini_tfds
  bvit train --config=imagenet_mini:teacher --workdir=TEACHER --config.data.data_dir=mini_tfds
  bvit convert TEACHER EXPORTED
  bvit train --config=imagenet_mini --workdir=DIR --config.data.data_dir=mini_tfds
    --config.teacher.path=EXPORTED
Argument: teacher trains a small DeiT with the recipe of deit_small; without it, a small BinaryViT is
  distilled from it with the recipe of binaryvit_small.
Data: made by the first two commands.
Expected: 0.8 % top-1 for both, 4.0 and 3.6 % top-5, where chance is 0.1 and 0.5 %: there are two training
  images per class. It rehearses the machinery, not the accuracy.
Hardware and cost: 46 and 93 seconds on two cores of an AMD EPYC.
"""

from typing import Any

from ml_collections import ConfigDict

from bvit_jax.configs import binaryvit_small, deit_small
from bvit_jax.errors import UserError
from bvit_jax.models import model_config

IMAGE_SIZE = 64


def get_config(variant: str = "") -> ConfigDict:
    """Returns the configuration of a full recipe with a small model and small images."""
    if variant not in ("", "teacher"):
        raise UserError(f"--config: imagenet_mini has no variant {variant!r}; known: teacher")
    if variant == "teacher":
        config = deit_small.get_config()
        sizes: dict[str, Any] = {"patch_size": 16, "width": 96, "depth": 4, "num_heads": 3, "mlp_dim": 192}
    else:
        config = binaryvit_small.get_config()
        config.model.depth, config.model.width = (1, 1, 1, 1), (16, 32, 64, 128)
        sizes = {"mlp_dim": (64, 128, 128, 256), "reduction": (4, 2, 1, 1)}
    config.model = model_config(**{**config.model.to_dict(), **sizes, "image_size": IMAGE_SIZE})
    config.batch_size = config.eval_batch_size = 100
    config.epochs = 20
    config.optim.learning_rate = 1e-2  # 400 steps are few for that of the full run
    config.eval_every_epochs = 5
    config.log_every_steps = 10
    return config
