"""BHViT, written again in PyTorch from its description alone; stands in for a checkout of its code in tests.

The names in state dicts, and those that ``parity dump`` replaces, are the code's; its lines are not.
"""

import json
from pathlib import Path
from types import SimpleNamespace

from transformer.BHViT import BHViTForImageClassification, norm_class


class ViTConfig:
    """Reads a config directory."""

    @staticmethod
    def from_pretrained(directory):
        return SimpleNamespace(**json.loads((Path(directory) / "config.json").read_text()))


def get_model(args, model_config, model_type, weight_bits, input_bits):
    """Returns the model that the code's arguments describe."""
    if model_type != "dbhvit":
        raise NotImplementedError(model_type)
    config = ViTConfig.from_pretrained(model_config)
    vars(config).update({**vars(args), "weight_bits": weight_bits, "input_bits": input_bits})
    config.layer_norm_eps, config.norm_layer = 1e-5, norm_class(config.replace_ln_bn)
    return BHViTForImageClassification(config)
