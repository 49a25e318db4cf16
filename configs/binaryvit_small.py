"""BinaryViT, 22.5 M parameters, distilled from a DeiT-S.

Command: bvit train --config=binaryvit_small[:VARIANT] --workdir=DIR --config.teacher.path=TEACHER
  --config.data.data_dir=DATA
VARIANT: some_fp keeps the patch embeddings between stages real; tpu touches a fifth of the bytes of memory,
  with bfloat16 activations, integer products and norms in one pass, which changes the numbers.
Data: TFDS imagenet2012 as ArrayRecord.
Expected: 67.7 % top-1 (BinaryViT, CVPRW 2023, as quoted by later papers).
Hardware and cost: not run. By the compiler's figures in docs/topologies.md, a step with 32 images per chip
  takes at least 12 ms on a TPU v5e with tpu, and 61 ms in float32 with remat=none; neither has been run on
  a TPU.
"""

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.errors import UserError, nearest
from bvit_jax.models import model_config

VARIANTS = ("some_fp", "tpu")


def get_config(variant: str = "") -> ConfigDict:
    """Returns the configuration of a ``run_binaryvit-small-patch4-224*.sh`` of the BinaryViT code."""
    if variant not in ("", *VARIANTS):
        raise UserError(f"--config: binaryvit_small has no variant {variant!r}{nearest(variant, VARIANTS)}")
    config = default_config()
    config.model = model_config("binaryvit", some_fp=variant == "some_fp")
    if variant == "tpu":
        config.compute_dtype = "bfloat16"
        config.remat = "products"
        config.one_pass_norms = True
    return config
