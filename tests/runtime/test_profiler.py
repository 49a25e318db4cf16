"""Traces: which steps, that they are whole, and the settings that are refused."""

import jax
import jax.numpy as jnp
import pytest

from bvit_jax import config as config_lib
from bvit_jax.errors import UserError
from bvit_jax.models import model_config
from bvit_jax.runtime.profiler import Profile


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda directory: calls.append(f"start {directory.name}")
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: calls.append(f"wait {x}"))
    return calls


def run(profile, calls, steps):
    for step in steps:
        profile.before(step)
        calls.append(str(step))
        profile.after(step, f"metrics {step}")


def test_counts_the_steps_of_this_process(tmp_path, calls):
    run(Profile(tmp_path, (2, 4)), calls, range(501, 507))
    start = ["501", "wait metrics 501", "start profile"]
    assert calls == [*start, "502", "503", "wait metrics 503", "stop", "504", "505", "506"]


def test_a_run_that_ends_in_a_trace(tmp_path, calls):
    profile = Profile(tmp_path, (1, 9))
    run(profile, calls, [1, 2])
    profile.close()
    profile.close()
    assert calls == ["wait None", "start profile", "1", "2", "wait metrics 2", "stop"]


def test_no_trace(tmp_path, calls):
    profile = Profile(tmp_path)
    run(profile, calls, [1, 2])
    profile.close()
    assert calls == ["1", "2"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_writes_a_trace(tmp_path):
    profile = Profile(tmp_path, (2, 3))
    double = jax.jit(lambda x: x * 2)
    x = jnp.ones(8)
    for step in (1, 2, 3):
        profile.before(step)
        x = double(x)
        profile.after(step, {"x": x})
        assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (step >= 2)


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "profile").write_text("")
    with pytest.raises(UserError, match=r"^cannot create [^\n]*profile: File exists; .*profile_steps"):
        Profile(tmp_path, (1, 2)).before(1)


@pytest.mark.parametrize("steps", [(), (1, 2), (10, 15)])
def test_good_settings(steps):
    config = config_lib.default_config()
    config.model = model_config("deit")
    config.profile_steps = steps
    config_lib.validate(config)


@pytest.mark.parametrize("steps", [(5,), (0, 3), (3, 3), (4, 2), (1, 2, 3), (1.0, 2)])
def test_bad_settings(steps):
    config = config_lib.default_config()
    config.profile_steps = steps
    with pytest.raises(UserError, match=r"^config.profile_steps is .*; expected \(\) or two ascending"):
        config_lib.validate(config)
