"""The real-valued DeiT-S, teacher of the binary models.

Command: bvit train --config=deit_small --workdir=DIR --config.data.data_dir=DATA
Data: TFDS imagenet2012 as ArrayRecord.
Expected: the DeiT paper publishes 79.9 % top-1 for its recipe. The moving average of the weights is off, as
  in the script of the BinaryViT code; DeiT's own recipe has --config.ema.decay=0.99996.
  docs/augmentation.md describes the augmentation.
Hardware and cost: not run.
"""

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.models import model_config


def get_config() -> ConfigDict:
    """Returns the configuration of ``run_deit-small-patch16-224.sh`` of the BinaryViT code.

    Its ``--color-jitter=0.4`` has no effect there: timm ignores the jitter when there is ``--aa``.
    """
    config = default_config()
    config.model = model_config("deit", norm_epsilon=1e-5, drop_path=0.1, weight_init="trunc_normal")
    config.loss.distillation_weight = 0.0
    config.data.crop_interpolation = "bicubic"
    config.data.auto_augment = "rand-m9-mstd0.5-inc1"
    config.data.repeats = 3
    config.erase.prob = 0.25
    config.mix.mixup_alpha = 0.8
    config.mix.cutmix_alpha = 1.0
    config.optim.warmup_epochs = 5
    config.optim.weight_decay = 0.05
    return config
