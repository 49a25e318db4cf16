"""Bi-ViT: a binary DeiT distilled from the real-valued one, whose weights it starts from.

Command: bvit train --config=bivit_deit:SIZE --workdir=DIR --config.teacher.path=TEACHER
  --config.data.data_dir=DATA
SIZE: tiny (default) or small. TEACHER: the DeiT of that size with a distillation token, such as
  facebook/deit-tiny-distilled-patch16-224 as a Hugging Face directory, or Facebook's .pth.
Two stages, weights first: --config.model.act_bits=32 in the first run; in the second, with another workdir,
  --config.init.path=DIR of the first.
Data: TFDS imagenet2012 as ArrayRecord.
Expected: not run; the paper publishes 28.7 % top-1 for tiny and 40.9 % for small, by a method known here
  only in outline (docs/bivit.md).
Hardware and cost: not run.
"""

from typing import Any

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.errors import UserError, nearest
from bvit_jax.models import model_config

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "num_heads": 3, "mlp_dim": 768},
    "small": {"width": 384, "num_heads": 6, "mlp_dim": 1536},
}


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the configuration."""
    if size not in SIZES:
        raise UserError(f"--config: bivit_deit has no size {size!r}{nearest(size, SIZES)}")
    config = default_config()
    config.model = model_config("bivit_deit", **SIZES[size], drop_path=0.1)
    config.init.path = config.teacher.get_oneway_ref("path")
    config.loss.distillation_weight = 0.5
    config.loss.teacher_targets = "hard"
    return augmented(config)


def augmented(config: ConfigDict) -> ConfigDict:
    """Returns the configuration with DeiT's augmentation, without mixing images."""
    config.data.crop_interpolation = "bicubic"
    config.data.auto_augment = "rand-m9-mstd0.5-inc1"
    config.data.repeats = 3
    config.erase.prob = 0.25
    return config
