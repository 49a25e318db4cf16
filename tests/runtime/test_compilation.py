"""Compiling ahead, giving up, and where compiled programs are kept."""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bvit_jax.errors import UserError
from bvit_jax.runtime import distributed, process
from bvit_jax.runtime.compilation import compile_all, lower
from tests.processes import environment


class Lowered:
    """Stands for a lowered function whose compilation takes its time, or fails."""

    def __init__(self, result: Any = None, *, waits: bool = False) -> None:
        self.result, self.waits = result, waits
        self.started, self.released = threading.Event(), threading.Event()

    def compile(self) -> Any:
        self.started.set()
        if self.waits:
            assert self.released.wait(30)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def never() -> bool:
    return False


def test_it_returns_what_compile_returns_in_order() -> None:
    slow, fast = Lowered("slow", waits=True), Lowered("fast")
    threading.Timer(0.3, slow.released.set).start()
    assert compile_all([("1", slow), ("2", fast)], never, threads=2) == ["slow", "fast"]
    assert compile_all([], never, threads=1) == []
    (compiled,) = (
        compile_all([("a sum", jax.jit(lambda x: x + 1).lower(jnp.ones(3)))], never, threads=1) or []
    )
    assert compiled(jnp.ones(3)).tolist() == [2, 2, 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_so_many_compile_at_the_same_time(threads: int) -> None:
    first, second = Lowered(waits=True), Lowered()
    overlap = []

    def release() -> None:
        overlap.append(second.started.wait(5 if threads == 2 else 0.5))
        first.released.set()

    threading.Thread(target=release).start()
    assert compile_all([("1", first), ("2", second)], never, threads=threads) == [None, None]
    assert overlap == [threads == 2]


def test_it_lowers_the_next_while_it_compiles() -> None:
    first = Lowered(waits=True)

    def programs() -> Iterator[tuple[str, Lowered]]:
        yield "1", first
        assert first.started.wait(30)
        first.released.set()
        yield "2", Lowered()

    assert compile_all(programs(), never, threads=1) == [None, None]


def test_it_gives_up_when_asked_and_drops_what_waits() -> None:
    first, second, start = Lowered(waits=True), Lowered(), time.perf_counter()
    assert compile_all([("1", first), ("2", second)], second.started.is_set, threads=2) is None
    assert compile_all([("1", first), ("2", third := Lowered())], lambda: True, threads=1) is None
    assert time.perf_counter() - start < 10
    first.released.set()
    assert not third.started.wait(0.5)


def test_an_error_does_not_wait_for_the_others() -> None:
    first, third, start = Lowered(waits=True), Lowered(), time.perf_counter()
    programs = [("1", first), ("2", Lowered(RuntimeError("other"))), ("3", third)]
    with pytest.raises(RuntimeError, match=r"^other$"):
        compile_all(programs, never, threads=2)
    assert time.perf_counter() - start < 10
    first.released.set()


def test_a_step_that_does_not_fit_is_one_line() -> None:
    error = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 20G\n")
    with pytest.raises(
        UserError, match=r"^x does not fit into the memory of a device: RESOURCE_EXHAUSTED.*hbm"
    ):
        compile_all([("x", Lowered(error))], never, threads=1)


FAILS_WHILE_IT_COMPILES = """
import jax, jax.numpy as jnp
from bvit_jax.runtime.compilation import compile_all, lower
from tests.processes import environment

def slow(x):
    for _ in range(400):
        x = jnp.sin(x @ x)
    return x

def programs():
    yield "slow", lower(jax.jit(slow), jnp.ones((8, 8)))
    yield "wrong", lower(jax.jit(lambda x: x / (1 // 0)), jnp.ones(3))

compile_all(programs(), lambda: False, threads=2)
"""


@pytest.mark.slow
def test_a_script_whose_tracing_fails_ends_with_its_error() -> None:
    """Threads that return from XLA while the interpreter ends must not abort the process."""
    command = [sys.executable, "-c", FAILS_WHILE_IT_COMPILES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 1, done.stderr
    assert "ZeroDivisionError: integer division or modulo by zero\n" in done.stderr


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
