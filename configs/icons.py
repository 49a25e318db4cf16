"""Small binary transformers on drawings of 237 things, distilled from a real DeiT.

Command: npm pack @iconify/json@2.2.535
  bvit prepare icons --package iconify-json-2.2.535.tgz --data_dir DATA
  bvit train --config=icons:teacher --workdir=TEACHER --config.data.data_dir=DATA
  bvit convert TEACHER EXPORTED
  bvit train --config=icons[:MODEL] --workdir=DIR --config.data.data_dir=DATA --config.teacher.path=EXPORTED
MODEL: binaryvit (default), some_fp, or a row between ReActNet-DeiT and BinaryViT: cls, avg_pool,
  multi_branch, ls.
Data: 26,022 drawings to train on and 4,434 held out, by designers of whom no drawing is seen in training.
Expected: 69.1 % top-1 for the teacher, 56.9 % for binaryvit; the others are in docs/results.md.
Hardware and cost: 15 minutes for the teacher, 4 for a student, on two cores of an Intel Xeon with AVX-512.
"""

from typing import Any

from ml_collections import ConfigDict

from bvit_jax.config import default_config
from bvit_jax.configs import react_deit_small
from bvit_jax.errors import UserError, nearest
from bvit_jax.models import model_config

IMAGE = {"image_size": 48, "num_classes": 237}
REACT_DEIT = {"patch_size": 8, "width": 48, "depth": 4, "num_heads": 3, "mlp_dim": 192}
BINARYVIT: dict[str, Any] = {
    "patch_size": 4,
    "width": (16, 32, 64),
    "depth": (1, 2, 2),
    "num_heads": (1, 2, 4),
    "mlp_dim": (64, 128, 256),
    "reduction": (4, 2, 1),
}
TEACHER = {"patch_size": 8, "width": 64, "depth": 4, "num_heads": 4, "mlp_dim": 256}
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
    config.batch_size = 64
    config.eval_batch_size = 256
    config.epochs = 4
    config.log_every_steps = 50
    config.data.dataset = "icons"
    config.data.eval_split = "test"
    config.data.crop_scale = (0.8, 1.0)
    config.data.flip = False  # left is not right
    config.data.eval_resize = 48
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.optim.learning_rate = 2e-3
    config.optim.lr_scale_batch = 64
    if model == "teacher":
        config.loss.distillation_weight = 0.0
        config.epochs = 12
        config.optim.warmup_epochs = 1
        config.optim.weight_decay = 0.05
    return config
