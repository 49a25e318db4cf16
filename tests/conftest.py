"""What all tests share: eight CPU devices, float64 on request, the golden files."""

import os

# Before jax is imported: both are read once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test with 64-bit types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compile_quickly() -> Iterator[None]:
    """Trades the speed of compiled functions for that of their compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def units() -> dict[str, np.ndarray]:
    """What PyTorch computed for single quantisers and layers."""
    with np.load(GOLDEN / "units.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def golden_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from the name of a golden file to the file, its parts put together."""
    directory = tmp_path_factory.mktemp("golden")

    def path_of(name: str) -> Path:
        first, second = GOLDEN / f"{name}.npz", GOLDEN / f"{name}-part2.npz"
        if not second.exists():
            return first
        whole = directory / first.name
        if not whole.exists():
            with np.load(first) as a, np.load(second) as b:
                np.savez(whole, **a, **b)
        return whole

    return path_of
