"""Constants that PyTorch's Swin modules keep among their arrays: relative positions and masks."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bvit_jax.models.swin import MERGE, stage_window
from bvit_jax.models.windows import relative_positions, shift_mask
from bvit_jax.weights.names import Naming


def window_constants(config: Mapping[str, Any], naming: Naming) -> dict[str, np.ndarray]:
    """Returns them by their names; empty for a model that is no Swin."""
    if config["name"] != "swin":
        return {}
    arrays: dict[str, np.ndarray] = {}
    side = config["image_size"] // config["patch_size"]
    for stage, depth in enumerate(config["depth"]):
        for i in range(depth):
            window = stage_window(side, config["window_size"], shifted=i % 2 == 1)
            table = naming.name(f"stage{stage}_block{i}/position_bias")
            index = table.replace("relative_position_bias_table", "relative_position_index")
            arrays[index] = relative_positions(window.size)
            if window.shift:
                block = naming.name(f"stage{stage}_block{i}/mlp_norm/scale").rsplit(".", 2)[0]
                arrays[f"{block}.attn_mask"] = shift_mask(window)
        side //= MERGE
    return arrays
