"""BinaryViT, 22.5 M parameters, distilled from a DeiT-S.

Command: python train.py --config=configs/binaryvit_small.py[:some_fp] --workdir=DIR
  --config.teacher.path=TEACHER --config.data.data_dir=DATA
Argument: some_fp keeps the patch embeddings between the stages real.
Data: TFDS imagenet2012 as ArrayRecord.
Expected: 67.7 % top-1 (BinaryViT, CVPRW 2023, as later papers quote it).
Hardware and cost: not run. On TPUs, by the compiler's figures in docs/topologies.md, add
  --config.compute_dtype=bfloat16 --config.remat=products --config.one_pass_norms
"""

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.errors import UserError
from bvit_jax.models import model_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the configuration of a ``run_binaryvit-small-patch4-224*.sh`` of the reference."""
    if variant not in ("", "some_fp"):
        raise UserError(f"--config: binaryvit_small has no variant {variant!r}; known: some_fp")
    config = default_config()
    config.model = model_config("binaryvit", some_fp=variant == "some_fp")
    return config
