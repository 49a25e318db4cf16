"""The start of a run whose quantisers take their values from the first batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import models
from bvit_jax.data import open_train_split
from bvit_jax.models.bhvit import LevelQuantizer
from bvit_jax.runtime.interruption import Interrupted
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated, shard_batch
from bvit_jax.training import initial
from bvit_jax.training.loop import train_and_evaluate
from bvit_jax.training.setup import build
from bvit_jax.training.steps.first_batch import starts_from_a_batch
from bvit_jax.weights.naming import path_name
from bvit_jax.weights.state_dicts import abstract_variables
from bvit_jax.workdir import runs
from tests.configs import tiny
from tests.inprocess import Notice, Trained, short_config
from tests.processes import metrics_of
from tests.tiny_models import SMALLEST

BHVIT = SMALLEST["bhvit"]


def config_of(data_dir, **settings):
    config = tiny.get_config()
    config.model = models.model_config(
        "bivit_release_deit",
        image_size=16,
        patch_size=4,
        num_classes=10,
        width=16,
        depth=2,
        num_heads=2,
        mlp_dim=32,
        distillation_token=False,
        distillation_head=False,
        attention_dropout=0.1,
        drop_path=0.1,
    )
    config.data.data_dir = str(data_dir)
    config.update(settings)
    return config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def called(tree, name):
    return [a for path, a in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == name]


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"accumulate_steps": 2, "ema": {"decay": 0.9}}])
def test_start_and_first_step(data_dir, settings):
    config = config_of(data_dir, **settings)
    run = build(config, open_train_split(config.data).num_examples)
    key = jax.random.key(3)
    state = run.programs.create.run(jax.random.key(0), {})
    before = jax.device_get(state)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (144, 16, 16, 3), np.uint8)
    batch = shard_batch({"image": images, "label": rng.integers(0, 10, 144, np.int32)}, run.mesh)
    state = run.programs.first_batch.run(state, batch, key)
    after = jax.device_get(state)
    assert all((flag == 1).all() for flag in called(after.batch_stats, "init_state"))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before.params, after.params)
    assert all(called(changed, "alpha") + called(changed, "zero_point"))
    assert not any(called(changed, "kernel") + called(changed, "scale") + called(changed, "bias"))
    if before.ema is not None:
        assert jax.tree.all(jax.tree.map(np.array_equal, after.ema["params"], after.params))
    again = jax.device_get(run.programs.first_batch.run(state, batch, key))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, after))

    state, metrics = run.programs.train.run(state, batch, {}, key)  # which takes the memory of the state
    assert np.isfinite(metrics["loss"])
    assert all((flag == 1).all() for flag in called(state.batch_stats, "init_state"))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), after.params, jax.device_get(state.params))
    assert all(called(changed, "alpha"))


def test_other_models_have_no_start(data_dir):
    config = tiny.get_config()
    run = build(config, 1000)
    assert run.programs.first_batch is None
    assert not starts_from_a_batch(run.state)


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
def test_a_run_starts_with_it(data_dir, tmp_path):
    config = config_of(data_dir, epochs=1, health=True)
    train_and_evaluate(config, tmp_path)
    saved = runs.load_run(tmp_path, "latest")
    assert all((flag == 1).all() for flag in called(saved.variables["batch_stats"], "init_state"))
    figures = [line for line in metrics_of(tmp_path) if "flipped" in line]
    assert figures
    assert figures[-1]["dead_heads"] == 0
    assert 0 < figures[-1]["active_weights"] <= 1
    scales = called(saved.variables["params"], "alpha")
    assert scales
    assert not any(np.allclose(scale, 1, atol=1e-2) for scale in scales)


# --- BHViT -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
def test_a_bhvit_that_is_killed_in_its_first_batch_or_stopped_after_it_continues(
    data_dir, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    config = short_config(data_dir)
    config.model = models.model_config("bhvit", num_classes=10, recu=True, shift_branches=(), **BHVIT)
    config.epochs, config.checkpoint.every_steps = 1, 4  # it has a thousand arrays to save
    config.loss.regularization_weight, config.loss.regularization_start = 0.1, 0.5
    config.health = False
    trained = Trained(config, tmp_path / "whole")
    start = trained.run.programs.first_batch.run

    def kill(*arguments):
        start(*arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trained.run.programs.first_batch, "run", kill)
        with pytest.raises(Killed):
            trained.train(tmp_path / "killed")
    trained.assert_continues(tmp_path / "killed")
    with pytest.raises(Interrupted):
        trained.train(tmp_path / "stopped", Notice(1))
    trained.assert_continues(tmp_path / "stopped")


@pytest.mark.usefixtures("x64")
def test_levels_of_eight_devices_are_those_of_one():
    """The values of the first batch, and the scale of the gradient, are those of the whole batch."""
    quantizer = LevelQuantizer()
    x = 3 * jax.nn.softmax(jax.random.normal(jax.random.key(0), (16, 2, 5, 5), jnp.float64))
    variables = {
        "params": {"alpha": jnp.ones(2), "zero_point": jnp.zeros(2)},
        "batch_stats": {"init_state": jnp.zeros((1,))},
    }

    def run(variables, x):
        _, started = quantizer.apply(variables, x, first_batch=True, mutable=["params", "batch_stats"])

        def loss(params):
            codes = quantizer.apply({**started, "params": params}, x)
            return jnp.sum(codes.dequantize() * jnp.sin(jnp.arange(x.size)).reshape(x.shape))

        return started, jax.grad(loss)(started["params"])

    found = []
    for devices in (1, 8):
        mesh = make_mesh(jax.devices()[:devices])
        shardings = (replicated(mesh), batch_sharded(mesh))
        placed = jax.device_put((variables, x), shardings)
        found.append(jax.device_get(jax.jit(run, in_shardings=shardings)(*placed)))
    assert found[0][0]["batch_stats"]["init_state"] == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *found)


def test_levels_start_in_the_second_stage_where_the_first_was_real():
    def arrays(**settings):
        config = models.model_config("bhvit", num_classes=5, **BHVIT, **settings)
        found = abstract_variables(models.create_model(config), config.image_size)
        return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}

    real, binary = arrays(weight_bits=32, act_bits=32), arrays(recu=True)
    selection = initial.select(
        {name: np.zeros(leaf.shape) for name, leaf in real.items()},
        {name: leaf.shape for name, leaf in binary.items()},
    )
    assert {name.rpartition("/")[2] for name in selection.kept} == {"alpha", "zero_point", "init_state"}
    assert selection.left_out == ()
    assert set(selection.taken) == real.keys()
