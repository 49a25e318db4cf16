"""Binary vision transformers in JAX/Flax, numerically equal to their PyTorch originals.

The public interface; everything is imported when it is first used, so that ``import bvit_jax`` costs
nothing. ``docs/api.md`` shows it at work. `load` reads a model of any origin, `create_model` builds one,
`train_and_evaluate` and `evaluate` are what the commands run; `layers` and `binary` are for your own models.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bvit_jax import binary, configs, layers, models
    from bvit_jax.errors import UserError
    from bvit_jax.inference import Classifier, export, load, predict, save
    from bvit_jax.models import create_model, model_config
    from bvit_jax.training.evaluation import evaluate_workdir as evaluate
    from bvit_jax.training.loop import train_and_evaluate

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "UserError",
    "__version__",
    "binary",
    "configs",
    "create_model",
    "evaluate",
    "export",
    "layers",
    "load",
    "model_config",
    "models",
    "predict",
    "save",
    "train_and_evaluate",
]

# Where each public name that is no module lives, and what it is called there.
_HOMES = {
    "Classifier": "bvit_jax.inference:Classifier",
    "UserError": "bvit_jax.errors:UserError",
    "create_model": "bvit_jax.models:create_model",
    "evaluate": "bvit_jax.training.evaluation:evaluate_workdir",
    "export": "bvit_jax.inference:export",
    "load": "bvit_jax.inference:load",
    "model_config": "bvit_jax.models:model_config",
    "predict": "bvit_jax.inference:predict",
    "save": "bvit_jax.inference:save",
    "train_and_evaluate": "bvit_jax.training.loop:train_and_evaluate",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in __all__:
        return importlib.import_module(f"bvit_jax.{name}")
    raise AttributeError(f"module 'bvit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
