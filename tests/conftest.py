"""What all tests share: checked shapes, eight CPU devices, quick compilation, float64, the golden files."""

import gc
import os
import tempfile

from tests.quick import xla_flags

# Before jax is imported, which reads each of these once. Workers and the processes that tests start inherit
# them, and with them what any of them has compiled.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(devices=8)
if "BVIT_JAX_TESTS_COMPILED" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="bvit_jax_compiled_")  # removed when this process ends
    os.environ["BVIT_JAX_TESTS_COMPILED"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

# Before bvit_jax is imported: every call in these rooms is checked against its signature.
CHECKED = ("augment", "binary", "layers", "losses", "optim", "models.windows")
jaxtyping.install_import_hook(
    [f"bvit_jax.{room}" for room in CHECKED],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # an int is a float too
)

# In the background of a shell, and below nohup, these are ignored, also by the processes that tests start.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _default)

jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes millions of objects, through which the collector goes again and again.
gc.set_threshold(100_000, 50, 100)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test with 64-bit types."""
    with jax.enable_x64(True):
        yield


# Where nothing may be promoted implicitly. Elsewhere it is meant: layers and models add (channels,) in the
# dtype of parameters to (..., channels) in the compute dtype, and optax raises floats to integer powers.
STRICT_DTYPES = {"augment", "binary", "losses"}
STRICT_RANKS = {"augment", "optim"}


@pytest.fixture(autouse=True)
def promote_explicitly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Refuses implicit promotion of dtypes and ranks in the tests of some rooms."""
    room = request.path.parent.name
    with (
        jax.numpy_dtype_promotion("strict" if room in STRICT_DTYPES else "standard"),
        jax.numpy_rank_promotion("raise" if room in STRICT_RANKS else "allow"),
    ):
        yield


@pytest.fixture
def promotion() -> Iterator[None]:
    """Allows implicit promotion of dtypes to the test of a whole model in a room that refuses it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def compile_quickly() -> None:
    """Fails where an earlier test has left XLA's optimisations on, which would slow down all others."""
    assert jax.config.values["jax_disable_most_optimizations"]


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test's runs take the first device alone: programs for eight take longer to compile."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: first)


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
