"""A run of seconds, for tests that start real processes."""

from ml_collections import ConfigDict

from bvit_jax.models import model_config
from configs import digits


def get_config(variant: str = "") -> ConfigDict:
    """Returns the configuration: 18 steps of a one-block pyramid, or ``real`` DeiT, with dropout."""
    config = digits.get_config()
    config.model = model_config(
        "binaryvit",
        image_size=16,
        patch_size=4,
        num_classes=10,
        width=(8,),
        depth=(1,),
        num_heads=(2,),
        mlp_dim=(16,),
        reduction=(2,),
        dropout=0.1,
        drop_path=0.1,
    )
    if variant == "real":
        config.model = model_config(
            "deit",
            image_size=16,
            patch_size=4,
            num_classes=10,
            width=16,
            depth=1,
            num_heads=2,
            mlp_dim=32,
            dropout=0.1,
        )
    config.teacher.path = ""
    config.loss.distillation_weight = 0.0
    config.batch_size = 144
    config.epochs = 2
    config.eval_every_epochs = 1
    config.log_every_steps = 3
    config.checkpoint.every_steps = 5
    config.data.eval_resize = 16
    return config
