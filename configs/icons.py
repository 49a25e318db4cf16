"""Small binary transformers on drawings of 237 things, distilled from a real DeiT.

Command: npm pack @iconify/json@2.2.535
  bvit prepare icons --package iconify-json-2.2.535.tgz --data_dir DATA
  bvit train --config=icons:teacher --workdir=TEACHER --config.data.data_dir=DATA
  bvit convert TEACHER EXPORTED
  bvit train --config=icons[:MODEL] --workdir=DIR --config.data.data_dir=DATA --config.teacher.path=EXPORTED
MODEL: binaryvit (default), some_fp, or a row between ReActNet-DeiT and BinaryViT: cls, avg_pool,
  multi_branch, ls.
Data: 26,114 drawings to train on and 4,451 held out, of designers whose others are not seen in training.
Expected: not run.
Hardware and cost: not run.
"""

from typing import Any

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.configs import react_deit_small
from bvit_jax.errors import UserError, nearest
from bvit_jax.models import model_config

IMAGE = {"image_size": 64, "num_classes": 237}
REACT_DEIT = {"patch_size": 8, "width": 96, "depth": 6, "num_heads": 3, "mlp_dim": 384}
BINARYVIT: dict[str, Any] = {
    "patch_size": 4,
    "width": (32, 64, 128),
    "depth": (2, 3, 3),
    "num_heads": (1, 2, 4),
    "mlp_dim": (256, 256, 512),
    "reduction": (4, 2, 1),
}
TEACHER = {"patch_size": 8, "width": 128, "depth": 6, "num_heads": 4, "mlp_dim": 512, "drop_path": 0.1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "teacher": ("deit", TEACHER),
    **{row: ("react_deit", REACT_DEIT | settings) for row, settings in react_deit_small.ROWS.items()},
    "binaryvit": ("binaryvit", BINARYVIT),
    "some_fp": ("binaryvit", BINARYVIT | {"some_fp": True}),
}


def get_config(model: str = "binaryvit") -> ConfigDict:
    """Returns the configuration."""
    if model not in MODELS:
        raise UserError(f"--config: icons has no model {model!r}{nearest(model, MODELS)}")
    family, settings = MODELS[model]
    config = default_config()
    config.model = model_config(family, **IMAGE, **settings)
    config.batch_size = 128
    config.eval_batch_size = 256
    config.epochs = 12
    config.eval_every_epochs = 2
    config.log_every_steps = 51
    config.data.dataset = "icons"
    config.data.eval_split = "test"
    config.data.crop_scale = (0.5, 1.0)
    config.data.flip = False  # left is not right
    config.data.auto_augment = "draw-m5-mstd2"
    config.data.eval_resize = 64
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.optim.learning_rate = 2e-3
    config.optim.lr_scale_batch = 128
    if model == "teacher":
        config.loss.distillation_weight = 0.0
        config.epochs = 25
        config.optim.learning_rate = 1e-3
        config.optim.warmup_epochs = 2
        config.optim.weight_decay = 0.05
    return config
