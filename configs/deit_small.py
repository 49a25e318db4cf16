"""The real-valued DeiT-S, teacher of the binary models.

Command: python train.py --config=configs/deit_small.py --workdir=DIR --config.data.data_dir=DATA
Data: TFDS imagenet2012 as ArrayRecord.
Expected: 79.9 % top-1 is what the DeiT paper publishes for its whole recipe. The augmentation here is
  crop and flip; RandAugment, mixup, cutmix, erasing and repeated augmentation are not part of it.
Hardware and cost: not run.
"""

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.models import model_config


def get_config() -> ConfigDict:
    """Returns the configuration of ``run_deit-small-patch16-224.sh`` of the reference."""
    config = default_config()
    config.model = model_config("deit", norm_epsilon=1e-5, drop_path=0.1)
    config.loss.distillation_weight = 0.0
    config.data.crop_interpolation = "bicubic"
    config.optim.warmup_epochs = 5
    config.optim.weight_decay = 0.05
    return config
