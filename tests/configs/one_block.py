"""Models of one block, which any compiler is done with in seconds; no data."""

from typing import Any

from ml_collections import ConfigDict

from bvit_jax.models import model_config
from tests.configs import tiny

SHAPES: dict[str, dict[str, Any]] = {
    "binaryvit": {"width": (8,), "depth": (1,), "num_heads": (1,), "mlp_dim": (16,), "reduction": (1,)},
    "deit": {"width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 16},
}


def get_config(name: str = "binaryvit") -> ConfigDict:
    """Returns the configuration of a model of that name, trained on labels alone."""
    config = tiny.get_config()
    config.model = model_config(name, image_size=16, patch_size=4, num_classes=10, **SHAPES[name])
    config.data.dataset, config.data.data_dir = "imagenet2012", "/nowhere"  # digits would prepare themselves
    config.batch_size = config.eval_batch_size = 64
    return config
