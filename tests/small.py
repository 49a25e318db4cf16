"""A model of two layers, for tests of the training step that need no transformer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bvit_jax.augment.augmentation import NO_AUGMENTATION
from bvit_jax.augment.normalization import Normalization
from bvit_jax.config import default_config
from bvit_jax.layers.norm import BatchNorm, LayerNorm
from bvit_jax.models.head import ModelOutput
from bvit_jax.optim import make_optimizer
from bvit_jax.training.steps import programs
from bvit_jax.training.steps.batch import Inputs
from bvit_jax.training.steps.train import Objective, TrainSettings, train_step

NORMALIZE = Normalization((0.5,) * 3, (0.25,) * 3)
SIZE, CLASSES = 4, 5


class Small(nn.Module):
    """Two layers with a norm between them."""

    norm: str = "batch_norm"
    group: int = 0
    dropout: float = 0.0
    dtype: type = jnp.float64

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images.reshape(images.shape[0], -1, 3).astype(self.dtype)
        x = nn.Dense(6, dtype=self.dtype, name="first")(x)
        norm = (
            BatchNorm(group=self.group, name="norm") if self.norm == "batch_norm" else LayerNorm(name="norm")
        )
        x = nn.Dropout(self.dropout)(jnp.tanh(norm(x, train=train)), deterministic=not train)
        logits = nn.Dense(CLASSES, name="head")(jnp.mean(x, axis=1))
        return ModelOutput(logits, (logits,))


def optimizer(**settings):
    """Returns AdamW at a constant rate, with an epsilon that keeps rounding errors small."""
    optim = default_config().optim
    optim.update({"eps": 1e-2, "weight_decay": 0.1, **settings})
    return make_optimizer(optim, lambda step: 0.1)


def make_train_step(
    model,
    optimizer,
    normalize,
    *,
    augmentation=NO_AUGMENTATION,
    accumulate_steps=1,
    ema_decay=0.0,
    mesh=None,
    **objective,
):
    """Returns the training step of these settings, of which ``objective`` are those of `Objective`."""
    inputs = Inputs(normalize, augmentation)
    return partial(
        train_step,
        TrainSettings(model, optimizer, inputs, Objective(**objective), accumulate_steps, ema_decay, mesh),
    )


def jit_train_step(step, mesh, **options):
    """Compiles what `make_train_step` returned for a mesh."""
    (settings,) = step.args
    return programs.jit_train_step(settings, mesh, **options)


def batch_of(number, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (number, SIZE, SIZE, 3), np.uint8),
        "label": rng.integers(0, CLASSES, number, np.int32),
    }


def wide(state):
    """Returns a state in float64."""
    return jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, state)


def assert_close(actual, expected, rtol=1e-10, atol=1e-13):
    """Asserts that two trees have one structure and nearly the same values."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))
