"""ReActNet-DeiT-S and the ablation rows between it and BinaryViT, distilled from a DeiT-S.

Command: bvit train --config=react_deit_small:ROW --workdir=DIR --config.teacher.path=TEACHER
  --config.data.data_dir=DATA
ROW: cls (the baseline, with a class token), avg_pool, multi_branch or ls (default); each adds one thing to
  the previous one: average pooling, pooling branches, LayerScale.
Data: TFDS imagenet2012 as ArrayRecord.
Expected: not run; the paper's ablation table has its figures for these rows.
Hardware and cost: not run.
"""

from typing import Any

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.errors import UserError, nearest
from bvit_jax.models import model_config

ROWS: dict[str, dict[str, Any]] = {
    "cls": {"class_token": True, "pool_branches": (), "layer_scale": False},
    "avg_pool": {"pool_branches": (), "layer_scale": False},
    "multi_branch": {"layer_scale": False},
    "ls": {},
}


def get_config(row: str = "ls") -> ConfigDict:
    """Returns the configuration of a ``run_reactdeit-small-patch16-224*.sh`` of the BinaryViT code."""
    if row not in ROWS:
        raise UserError(f"--config: react_deit_small has no row {row!r}{nearest(row, ROWS)}")
    config = default_config()
    config.model = model_config("react_deit", **ROWS[row])
    return config
