"""BHViT, 22.6 M parameters (tiny: 13.8 M), distilled from a DeiT-S.

Command: bvit train --config=bhvit[:VARIANTS] --workdir=DIR --config.teacher.path=TEACHER
  --config.data.data_dir=DATA
VARIANTS: any of these, with commas between them, as in bhvit:tiny,fp_downsample.
  tiny or small (default): the size.
  fp_downsample: the layers that halve the grid stay real.
  second_stage: starts from another run, --config.init.path=DIR, with the gradient of ReCU and with weights
    drawn to ±1 (0.9 of distillation and 0.1 of that term).
TEACHER: a DeiT-S such as Facebook's deit_small_patch16_224-cd65a155.pth.
Data: TFDS imagenet2012 as ArrayRecord.
Expected: not run; published are 68.4 % top-1, and 70.1 % with fp_downsample (tiny: 64.0 and 66.0; BHViT,
  CVPR 2025). Which stages gave these figures is not published.
Hardware and cost: not run.
"""

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.errors import UserError, nearest
from bvit_jax.models import model_config

VARIANTS = ("tiny", "small", "fp_downsample", "second_stage")


def get_config(variants: str = "small") -> ConfigDict:
    """Returns the configuration of ``scripts/run_BHViT.sh`` of the code, or of the second stage there."""
    chosen = variants.split(",")
    for name in chosen:
        if name not in VARIANTS:
            raise UserError(f"--config: bhvit has no variant {name!r}{nearest(name, VARIANTS)}")
    if {"tiny", "small"} <= {*chosen}:
        raise UserError(f"--config: bhvit has one size, and {variants!r} names two")
    config = default_config()
    depth = (2, 2, 6, 2) if "tiny" in chosen else (3, 4, 8, 4)
    config.model = model_config("bhvit", depth=depth, some_fp="fp_downsample" in chosen)
    config.epochs = 100
    config.batch_size = 256
    config.optim.schedule = "cosine_by_epoch"
    config.optim.min_learning_rate = 1e-8
    if "second_stage" in chosen:
        config.model.recu = True
        config.loss.distillation_weight = 0.9
        config.loss.regularization_weight = 0.1
    return config
