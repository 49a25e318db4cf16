"""BinaryViT, 22.5 M parameters, distilled from a DeiT-S.

Command: python train.py --config=configs/binaryvit_small.py[:VARIANT] --workdir=DIR
  --config.teacher.path=TEACHER --config.data.data_dir=DATA
VARIANT: some_fp keeps the patch embeddings between the stages real; tpu trains in a fifth of the bytes, with
  bfloat16 activations, integer products and norms in one pass, which changes the numbers.
Data: TFDS imagenet2012 as ArrayRecord.
Expected: 67.7 % top-1 (BinaryViT, CVPRW 2023, as later papers quote it).
Hardware and cost: not run. With tpu, not run on a TPU; by the compiler's figures in docs/topologies.md a step
  of 32 images per chip takes at least 12 ms on a TPU v5e, where in float32 with remat=none it takes 61.
"""

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.errors import UserError, nearest
from bvit_jax.models import model_config

VARIANTS = ("some_fp", "tpu")


def get_config(variant: str = "") -> ConfigDict:
    """Returns the configuration of a ``run_binaryvit-small-patch4-224*.sh`` of the reference."""
    if variant not in ("", *VARIANTS):
        raise UserError(f"--config: binaryvit_small has no variant {variant!r}{nearest(variant, VARIANTS)}")
    config = default_config()
    config.model = model_config("binaryvit", some_fp=variant == "some_fp")
    if variant == "tpu":
        config.compute_dtype = "bfloat16"
        config.remat = "products"
        config.one_pass_norms = True
    return config
