"""Bi-ViT: a binary Swin distilled from the real-valued one, whose weights it starts from.

Command: bvit train --config=bivit_swin:SIZE --workdir=DIR --config.teacher.path=TEACHER
  --config.data.data_dir=DATA
SIZE: tiny (default) or small. TEACHER: the Swin of that size with windows of 7, such as
  microsoft/swin-tiny-patch4-window7-224 as a Hugging Face directory, or Microsoft's .pth.
Two stages: as in bivit_deit.
Data: TFDS imagenet2012 as ArrayRecord.
Expected: not run; the paper publishes 55.5 % top-1 for tiny, by a method known here only in outline
  (docs/bivit.md).
Hardware and cost: not run.
"""

from typing import Any

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.configs.bivit_deit import augmented
from bvit_jax.errors import UserError, nearest
from bvit_jax.models import model_config

SIZES: dict[str, dict[str, Any]] = {"tiny": {"depth": (2, 2, 6, 2)}, "small": {"depth": (2, 2, 18, 2)}}


def get_config(size: str = "tiny") -> ConfigDict:
    """Returns the configuration."""
    if size not in SIZES:
        raise UserError(f"--config: bivit_swin has no size {size!r}{nearest(size, SIZES)}")
    config = default_config()
    config.model = model_config("bivit_swin", **SIZES[size], drop_path=0.1)
    config.init.path = config.teacher.get_oneway_ref("path")
    return augmented(config)
