"""Binary vision transformers in JAX/Flax, numerically equal to their PyTorch originals.

The public interface; everything is imported when it is first used, so that ``import bvit_jax`` costs
nothing. ``docs/api.md`` shows it at work. `load` reads a model of any origin, `create_model` builds one,
`train_and_evaluate` and `evaluate` are what the commands run; `layers` and `binary` are for your own models.
"""

from typing import TYPE_CHECKING

from bvit_jax.imports import lazily

if TYPE_CHECKING:
    from bvit_jax import binary, configs, layers, models
    from bvit_jax.errors import UserError
    from bvit_jax.inference import Classifier, export, load, predict, save
    from bvit_jax.models import create_model, model_config
    from bvit_jax.training.evaluation import evaluate_workdir as evaluate
    from bvit_jax.training.loop import train_and_evaluate

__version__ = "0.2.0"

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

__getattr__ = lazily(__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
