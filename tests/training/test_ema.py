"""The moving average: its formula, its place in checkpoints and evaluation, resuming with it."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.runtime.mesh import make_mesh
from bvit_jax.training.evaluation import deciding_top1, evaluate_workdir
from bvit_jax.training.loop import train_and_evaluate
from bvit_jax.training.steps.state import TrainState, abstract_state, create_state
from bvit_jax.workdir import runs
from bvit_jax.workdir.checkpoint import Checkpoints
from tests.configs import tiny
from tests.processes import metrics_of
from tests.small import NORMALIZE, SIZE, Small, assert_close, batch_of, make_train_step, optimizer, wide

KEY = jax.random.key(0)
ONE_DEVICE = make_mesh(jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [1, 2])
def test_it_averages_parameters_and_statistics(k):
    decay, model = 0.75, Small()
    step = jax.jit(make_train_step(model, optimizer(), NORMALIZE, accumulate_steps=k, ema_decay=decay))
    state = wide(create_state(KEY, model, optimizer(), SIZE, ema=True))
    plain = state.replace(ema=None)
    expected = state.variables
    assert_close(state.ema, expected)
    for seed in range(3):
        state, _ = step(state, batch_of(8, seed), {}, KEY)
        plain, _ = step(plain, batch_of(8, seed), {}, KEY)
        expected = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, expected, plain.variables)
        assert_close(state.ema, expected)
    assert_close(state.replace(ema=None), plain)  # nothing else depends on it
    assert np.any(state.ema["batch_stats"]["norm"]["var"] != state.batch_stats["norm"]["var"])


def saved(directory: Path, state: Any) -> None:
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.close()


def restored(directory: Path, abstract: Any) -> Any:
    checkpoints = Checkpoints(directory, keep=1)
    try:
        return checkpoints.restore(abstract)[0]
    finally:
        checkpoints.close()


def test_without_it_the_state_has_no_such_branch():
    state = create_state(KEY, Small(dtype=jnp.float32), optimizer(), SIZE)
    names = {path[0].name for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert names == {"step", "params", "batch_stats", "opt_state"}
    assert isinstance(jax.tree.map(jnp.zeros_like, state), TrainState)


def test_a_run_with_it_does_not_continue_without_it(tmp_path):
    model = Small(dtype=jnp.float32)
    saved(tmp_path, create_state(KEY, model, optimizer(), SIZE, ema=True))
    with pytest.raises(UserError, match=r"does not fit this configuration: ema/batch_stats/norm/mean is"):
        restored(tmp_path, abstract_state(model, optimizer(), SIZE, ONE_DEVICE))
    state = restored(tmp_path, abstract_state(model, optimizer(), SIZE, ONE_DEVICE, ema=True))
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.variables)


def test_the_average_decides_which_checkpoint_is_best():
    assert deciding_top1({"top1": 0.5}) == 0.5
    assert deciding_top1({"top1": 0.5, "ema_top1": 0.25}) == 0.25


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
def test_a_run_keeps_evaluates_and_resumes_it(tmp_path):
    config = tiny.get_config()
    config.data.data_dir = str(tmp_path / "data")
    shape = {"image_size": 16, "patch_size": 4, "width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    config.model = models.model_config("deit", num_classes=10, **shape)
    config.batch_size, config.epochs, config.checkpoint.every_steps = 480, 2, 3
    config.ema.decay = 0.5
    whole = tmp_path / "whole"
    printed = train_and_evaluate(config, whole)
    lines = [line for line in metrics_of(whole) if "eval_ema_top1" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert printed["best_top1"] == max(line["eval_ema_top1"] for line in lines)
    assert lines[-1]["eval_ema_loss"] != lines[-1]["eval_loss"]
    assert not any("ema_images" in key for key in printed)

    # Its figures are those of the evaluation afterwards, by default.
    averaged = evaluate_workdir(whole, "latest", {})
    raw = evaluate_workdir(whole, "latest", {}, ema=False)
    assert (averaged["ema"], raw["ema"]) == (True, False)
    for name in ("top1", "top5", "loss"):
        assert averaged[name] == printed[f"ema_{name}"]
        assert raw[name] == printed[name]

    # Its weights are those of the model, by default.
    assert runs.load_model(whole).history[0]["weights"] == "ema"
    assert "weights" not in runs.load_model(whole, ema=False).history[0]
    kernels = [runs.load_model(whole, ema=ema).variables["params"]["head"]["kernel"] for ema in (None, False)]
    assert np.any(kernels[0] != kernels[1])

    # A run that was cut off gets to the same figures, bit for bit.
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "4")
    assert train_and_evaluate(config, broken) == printed
    assert metrics_of(broken) == metrics_of(whole)
    for ema in (True, False):
        models_of = [runs.load_model(path, ema=ema).variables for path in (whole, broken)]
        jax.tree.map(np.testing.assert_array_equal, *models_of)


def test_an_average_that_is_not_kept_is_named(tmp_path):
    with pytest.raises(UserError, match=r"keeps no moving average, since its config.ema.decay is 0"):
        runs.use_average(tmp_path, tiny.get_config(), True)
    assert not runs.use_average(tmp_path, tiny.get_config(), None)
    assert not runs.use_average(tmp_path, tiny.get_config(), False)
    with pytest.raises(UserError, match=r"is no training run, which could keep a moving average"):
        runs.load_model(tmp_path, ema=False)
