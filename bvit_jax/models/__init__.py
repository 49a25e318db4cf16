"""The models; `create_model` is the only door."""

from bvit_jax.models.factory import create_model, model_config, num_params, packs_signs, real_backbone
from bvit_jax.models.head import ModelOutput

__all__ = ["ModelOutput", "create_model", "model_config", "num_params", "packs_signs", "real_backbone"]
