"""The models: blocks, families, and the registry from which `create_model` builds one.

A family is one module here, with its settings and its ``validate()``, and an entry of
`bvit_jax.models.factory.MODELS`. `execution` is how a model runs. May import `bvit_jax.layers` and
`bvit_jax.binary`; knows no optimiser, no data and no files.
"""

from typing import TYPE_CHECKING

from bvit_jax.imports import lazily

if TYPE_CHECKING:
    from bvit_jax.models.choice import choose
    from bvit_jax.models.execution.stages import Execution
    from bvit_jax.models.factory import (
        create_model,
        current_name,
        family,
        model_config,
        num_params,
        packs_signs,
        real_backbone,
        same_layers,
    )
    from bvit_jax.models.head import ModelOutput

__all__ = [
    "Execution",
    "ModelOutput",
    "choose",
    "create_model",
    "current_name",
    "family",
    "model_config",
    "num_params",
    "packs_signs",
    "real_backbone",
    "same_layers",
]

__getattr__ = lazily(__name__)
