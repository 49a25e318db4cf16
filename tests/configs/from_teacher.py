"""A binary DeiT that starts from its teacher's weights, for tests that start real processes."""

from ml_collections import ConfigDict

from bvit_jax.models import model_config
from tests.configs import tiny

SHAPE = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}


def get_config() -> ConfigDict:
    """Returns the configuration of a run of four steps with both heads and a moving average."""
    config = tiny.get_config()
    config.model = model_config("bivit_release_deit", num_classes=10, **SHAPE)
    config.init.path = config.teacher.get_oneway_ref("path")
    config.loss.distillation_weight = 0.5
    config.loss.teacher_targets = "hard"
    config.batch_size, config.epochs, config.log_every_steps = 480, 2, 1
    config.checkpoint.every_steps = 2
    config.ema.decay = 0.5
    return config
