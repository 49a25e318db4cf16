"""Compiling ahead, giving up, and where compiled programs are kept."""

import gc
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bvit_jax.errors import UserError
from bvit_jax.runtime import distributed, process
from bvit_jax.runtime.compilation import Compilation, lower


def test_it_returns_what_compile_returns() -> None:
    compiled = Compilation("a sum", jax.jit(lambda x: x + 1).lower(jnp.ones(3))).wait(lambda: False)
    assert compiled(jnp.ones(3)).tolist() == [2, 2, 2]


class Lowered:
    """Stands for a lowered function whose compilation takes its time, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.released = error, threading.Event()

    def compile(self) -> Any:
        if self.error is not None:
            raise self.error
        self.released.wait(30)


def test_it_gives_up_when_told() -> None:
    lowered, start = Lowered(), time.perf_counter()
    assert Compilation("nothing", lowered).wait(lambda: True) is None
    assert time.perf_counter() - start < 10
    lowered.released.set()


def test_a_step_that_does_not_fit_is_told_in_one_line() -> None:
    error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 20G\n")
    with pytest.raises(UserError, match=r"does not fit into the memory of a device: RESOURCE_EXHAUSTED.*hbm"):
        Compilation("x", Lowered(error)).wait(lambda: False)
    with pytest.raises(RuntimeError, match=r"^other$"):
        Compilation("x", Lowered(RuntimeError("other"))).wait(lambda: False)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be set, in place of setting it for all tests that follow."""
    changed: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    monkeypatch.delenv(process.CACHE_VARIABLE, raising=False)
    return changed


def test_the_cache_is_the_user_s(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    process._use_cache()
    (directory,) = settings.values()
    assert Path(directory).parent == tmp_path / "bvit_jax"
    monkeypatch.setattr(Path, "read_text", lambda path: "flags : fpu\n")
    process._use_cache()
    assert settings["jax_compilation_cache_dir"] != directory  # another CPU


def test_in_a_process_of_ours_it_lowers_without_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_ours", True)

    def traced(x: jax.Array) -> jax.Array:
        assert not gc.isenabled()
        return x + 1

    assert lower(jax.jit(traced), jnp.ones(3)).compile()(jnp.ones(3)).tolist() == [2, 2, 2]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        lower(jax.jit(lambda x: x / (1 // 0)), jnp.ones(3))
    assert gc.isenabled()


def test_the_environment_moves_the_cache_or_switches_it_off(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(process.CACHE_VARIABLE, "/elsewhere")
    process._use_cache()
    assert settings == {}
    monkeypatch.setenv(process.CACHE_VARIABLE, "")
    process._use_cache()
    assert settings == {"jax_enable_compilation_cache": False}


def test_a_machine_with_the_tpu_s_compiler_alone_is_no_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not distributed._on_tpu()
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([path / "accel0"]))
    assert distributed._on_tpu()
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert distributed._on_tpu()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not distributed._on_tpu()


def test_a_user_without_a_home_has_no_cache(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", missing)
    process._use_cache()
    assert settings == {}
