"""The settings of memory and batch size: what they reach, and which values are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import config as config_lib
from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.models.execution.stages import Execution
from bvit_jax.training.setup import build
from bvit_jax.training.steps.state import create_state
from tests.configs import tiny
from tests.small import NORMALIZE, make_train_step, optimizer


def config_with(**settings):
    config = tiny.get_config()
    for key, value in settings.items():
        node, _, name = key.replace("__", ".").rpartition(".")
        parent = config
        for part in node.split(".") if node else []:
            parent = parent[part]
        parent[name] = value
    return config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_steps": 0}, "config.accumulate_steps is 0; expected a whole number of at least 1"),
        ({"remat": "all"}, "config.remat is 'all'; expected one of auto, none, block, dots, products"),
        ({"ema__decay": 1.0}, "config.ema.decay is 1.0; expected a number from 0 to below 1, since 1 would"),
        ({"ema__decay": -0.1}, "config.ema.decay is -0.1; expected a number from 0 to below 1"),
        ({"optim__rules": (("(", 1.0, 1.0),)}, "which is not a regular expression"),
        (
            {"accumulate_steps": 4},  # 144 images, 8 devices
            "config.batch_size is 144; expected a multiple of 32 = config.accumulate_steps * 8 devices",
        ),
        (
            {"accumulate_steps": 2, "model__batch_norm_group": 48},
            "config.model.batch_norm_group is 48; expected a divisor of the 72 images of a microbatch",
        ),
        (
            {"optim__rules": (("block7/.*", 0.5, 1.0),)},
            "config.optim.rules[0] ('block7/.*') matches no parameter; the nearest are block",
        ),
    ],
)
def test_wrong_settings_are_named(settings, message):
    config = config_with(**settings)

    def check():
        config_lib.validate(config)
        build(config, 1437)

    with pytest.raises(UserError) as error:
        check()
    assert message in str(error.value)


def test_the_settings_reach_the_run():
    settings = {
        "accumulate_steps": 2,
        "remat": "dots",
        "scan_blocks": True,
        "ema__decay": 0.9,
        "optim__rules": (("block0/.*", 0.5, 1.0),),
        "model__batch_norm_group": 9,
    }
    run = build(config_with(**settings), 1437)
    assert run.model.block.execution == Execution("dots", True)
    assert run.model.block.batch_norm_group == 9
    assert run.state.ema == run.state.variables
    plain = build(config_with(), 1437)
    assert plain.model.block.execution == Execution("none", False)
    assert plain.state.ema is None
    assert jax.tree.structure(run.state.replace(ema=None)) == jax.tree.structure(plain.state)


# --- bfloat16 ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_in_bfloat16_keeps_everything_in_float32_and_learns():
    shape = {"width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 8, "image_size": 8, "patch_size": 4}
    config = models.model_config("react_deit", num_classes=4, drop_path=0.1, **shape)
    model = models.create_model(config, jnp.bfloat16, Execution("block", scan_blocks=True))
    settings = {"accumulate_steps": 2, "ema_decay": 0.9, "label_smoothing": 0.0}
    adam = optimizer(rules=(("head/.*", 2.0, 1.0),))
    step = jax.jit(make_train_step(model, adam, NORMALIZE, **settings))
    state = jax.jit(lambda key: create_state(key, model, adam, 8, ema=True))(jax.random.key(0))
    rng = np.random.default_rng(0)
    labels = np.arange(16, dtype=np.int32) % 4
    images = 60 * labels[:, None, None, None] + rng.integers(0, 60, (16, 8, 8, 3))
    batch = jax.device_put({"image": images.astype(np.uint8), "label": labels})
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch, {}, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.6 * losses[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, metrics)):
        kind = jnp.int32 if leaf.dtype == jnp.int32 else jnp.float32
        assert leaf.dtype == kind, path
    assert jax.tree.leaves(state.ema["batch_stats"])
    hidden = jax.eval_shape(
        lambda v: model.apply(v, NORMALIZE(batch["image"]), capture=True).hidden_states, state.variables
    )
    assert {a.dtype for a in hidden} == {jnp.dtype(jnp.bfloat16)}
