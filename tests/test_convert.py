from pathlib import Path

import jax
import numpy as np
import pytest

from bvit_jax import optim
from bvit_jax.checkpoint import Checkpoints
from bvit_jax.config import save
from bvit_jax.convert import main
from bvit_jax.models import create_model
from bvit_jax.pretrained import load_pretrained
from bvit_jax.sharding import make_mesh, replicated
from bvit_jax.train_state import create_state
from configs import deit_digits, digits


def test_the_deit_of_a_run_comes_back(tmp_path: Path) -> None:
    config = deit_digits.get_config()
    config.data.data_dir = str(tmp_path / "data")
    config.model.depth = 1
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    save(config, run / "config.json")
    optimizer = optim.make_optimizer(config.optim, lambda step: 1.0)
    state = create_state(jax.random.key(0), create_model(config.model), optimizer, 32)
    state = jax.device_put(state, replicated(make_mesh(jax.devices()[:1])))
    checkpoints = Checkpoints(run, keep=1)
    checkpoints.save_latest(0, state, {})
    checkpoints.close()

    assert main([str(run), str(target)]) == 0
    settings, variables = load_pretrained(target)
    assert settings == config.model
    for ours, theirs in zip(jax.tree.leaves(variables["params"]), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "target")]) == 1
    assert capsys.readouterr().err.startswith(f"error: no config.json in {tmp_path}")
    save(digits.get_config(), tmp_path / "config.json")
    assert main([str(tmp_path), str(tmp_path / "target")]) == 1
    assert "only 'deit' has a Hugging Face format" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()
