"""Schedules against the learning rates of the PyTorch scripts, the optimiser against torch's."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bvit_jax import optim
from bvit_jax.config import SETTINGS, default_config
from bvit_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.npz"
EPOCHS = 300


def settings(**values):
    config = default_config().optim
    config.update(values)
    return config


def deit():
    return settings(warmup_epochs=5, warmup_learning_rate=1e-6)


def schedule_of(config, batch_size=512, steps_per_epoch=10, epochs=EPOCHS):
    return optim.make_schedule(config, batch_size=batch_size, steps_per_epoch=steps_per_epoch, epochs=epochs)


@pytest.mark.parametrize(("name", "config"), [("binary", settings()), ("deit", deit())])
def test_schedule_by_epoch_equals_the_scripts(name, config):
    config.schedule = "cosine_by_epoch"
    expected = np.load(GOLDEN)[name]
    with jax.enable_x64(True):
        schedule = jax.vmap(schedule_of(config))
        first = schedule(10 * jnp.arange(EPOCHS))
        last = schedule(10 * jnp.arange(EPOCHS) + 9)
    np.testing.assert_allclose(first, expected, rtol=1e-12, atol=0)
    np.testing.assert_array_equal(first, last)
    traced = jax.jit(jax.vmap(schedule_of(config)))(10 * jnp.arange(EPOCHS))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, expected, rtol=2e-6)


@pytest.mark.parametrize(("name", "config"), [("binary", settings()), ("deit", deit())])
def test_smooth_schedule_passes_through_the_epoch_marks(name, config):
    expected = np.load(GOLDEN)[name]  # the scripts' epoch n + 1 is at mark n
    with jax.enable_x64(True):
        schedule = jax.vmap(schedule_of(config))
        marks = schedule(10 * jnp.arange(EPOCHS - 1))
        steps = np.asarray(schedule(jnp.arange(10 * EPOCHS + 20)))
    np.testing.assert_allclose(marks, expected[1:], rtol=1e-12, atol=0)
    warm = 10 * config.warmup_epochs
    assert (np.diff(steps[:warm]) > 0).all()
    assert (np.diff(steps[warm : 10 * EPOCHS]) < 0).all()
    np.testing.assert_allclose(steps[10 * EPOCHS :], config.min_learning_rate, rtol=1e-12)


def test_the_peak_scales_with_the_batch_and_the_minimum_does_not():
    with jax.enable_x64(True):
        schedule = schedule_of(settings(), batch_size=1024)
        np.testing.assert_allclose(schedule(0), 1e-3, rtol=1e-12)
        np.testing.assert_allclose(schedule(3000), 1e-5, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"schedule": "cosin"}, "schedule"),
        ({"warmup_epochs": 300}, "warmup_epochs"),
        ({"min_learning_rate": 1e-2}, "min_learning_rate"),
        ({"warmup_epochs": 1, "warmup_learning_rate": 1.0}, "warmup_learning_rate"),
    ],
)
def test_settings_that_exclude_each_other(values, key):
    with pytest.raises(UserError, match=rf"^config\.optim\.{key} is [^\n]*$"):
        schedule_of(settings(**values))


def test_the_schedules_are_those_of_the_settings():
    assert SETTINGS["optim.schedule"].values.choices == optim.SCHEDULES


def parameters():
    rng = np.random.default_rng(0)
    shapes = {
        "position_embedding": (1, 5, 4),
        "kernel": (4, 3),
        "bias": (2, 3),  # not decayed for its name
        "scale": (3,),
        "clip": (),
    }
    return {"block": {name: rng.standard_normal(shape) for name, shape in shapes.items()}}


def test_decay_mask():
    assert optim.decay_mask(parameters()) == {
        "block": {
            "position_embedding": True,
            "kernel": True,
            "bias": False,
            "scale": False,
            "clip": False,
        }
    }


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [0.0, 1.5, 1e4])
def test_equals_torch_adamw(weight_decay, clip):
    torch = pytest.importorskip("torch")
    config = settings(
        weight_decay=weight_decay,
        clip_grad_norm=clip,
        warmup_epochs=2,
        learning_rate=0.1,
        warmup_learning_rate=0.02,
        eps=1e-3,
    )
    with jax.enable_x64(True):
        schedule = schedule_of(config, steps_per_epoch=2, epochs=6)
        optimizer = optim.make_optimizer(config, schedule)
        params = jax.tree.map(jnp.asarray, parameters())
        state = optimizer.init(params)
        theirs = {k: torch.from_numpy(v).clone() for k, v in parameters()["block"].items()}
        decays = optim.decay_mask(parameters())["block"]
        reference = torch.optim.AdamW(
            [
                {
                    "params": [p for k, p in theirs.items() if decays[k]],
                    "weight_decay": weight_decay,
                },
                {"params": [p for k, p in theirs.items() if not decays[k]], "weight_decay": 0.0},
            ],
            lr=1.0,
            betas=(0.9, 0.999),
            eps=1e-3,
        )
        update = jax.jit(optimizer.update)
        rng = np.random.default_rng(1)
        for step in range(8):
            gradients = jax.tree.map(lambda p: rng.standard_normal(p.shape), parameters())
            for name, p in theirs.items():
                p.grad = torch.from_numpy(np.array(gradients["block"][name]))
            if clip:
                torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
            for group in reference.param_groups:
                group["lr"] = float(schedule(step))
            reference.step()
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        for name, p in theirs.items():
            np.testing.assert_allclose(params["block"][name], p.numpy(), rtol=1e-12, atol=1e-14)


def test_the_state_holds_arrays_and_one_structure():
    params = jax.tree.map(jnp.asarray, parameters())
    structures = set()
    for values in ({}, {"weight_decay": 0.1, "clip_grad_norm": 1.0}):
        config = settings(**values)
        state = optim.make_optimizer(config, schedule_of(config)).init(params)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        structures.add(jax.tree.structure(state))
    assert len(structures) == 1


@pytest.mark.slow
def test_a_given_mask_decides_what_decays():
    params = jax.tree.map(jnp.asarray, parameters())
    config = settings(weight_decay=0.5)
    only_clip = jax.tree_util.tree_map_with_path(lambda path, _: "clip" in str(path), params)
    optimizer = optim.make_optimizer(config, schedule_of(config), only_clip)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = jax.tree.map(lambda u: bool((u != 0).any()), updates)
    assert moved == only_clip


@pytest.mark.slow
def test_global_norm_is_that_of_optax_with_a_sum_for_each_shape():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 5)
        shapes = [(3, 4), (4,), (), (4,), (3, 4)]
        tree = {str(i): jax.random.normal(key, s) for i, (key, s) in enumerate(zip(keys, shapes))}
        np.testing.assert_allclose(optim.global_norm(tree), optax.tree.norm(tree), rtol=1e-14)
        program = str(jax.make_jaxpr(optim.global_norm)(tree))
    assert program.count("reduce_sum[") <= 3
    assert optim.global_norm({}) == 0
