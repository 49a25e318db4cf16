"""Checkpoints: exact, complete or invisible, verified, and clear about what does not fit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.checkpoint import Checkpoints, restore_variables
from bvit_jax.errors import UserError

METADATA = {"mean": 0.1 + 0.2, "window": {"loss": [1e-300, 3]}, "best": None, "name": "ü"}


class Moments(NamedTuple):
    count: Any
    mu: Any


def make_state(seed=0, width=200) -> dict[str, Any]:
    w = jax.random.normal(jax.random.key(seed), (16, width))
    params = {"block_0": {"kernel": w, "shift": w[0].astype(jnp.bfloat16)}, "clip": w[0, 0]}
    return {
        "step": jnp.int32(seed),
        "params": params,
        "batch_stats": {"mean": w[1]},
        "opt_state": ((), Moments(jnp.int32(7), jax.tree.map(jnp.cos, params)), ()),
        "ema": None,
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_identical(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def checkpoints(tmp_path):
    opened = []

    def reopen(keep=2):
        opened.append(Checkpoints(tmp_path, keep))
        return opened[-1]

    yield reopen
    for each in opened:
        each.close()


def test_round_trip_is_bit_identical(checkpoints):
    state = make_state(3)
    checkpoints().save_latest(3, state, METADATA)
    restored, metadata = checkpoints().restore("latest", abstract(state))
    assert_identical(restored, state)
    assert metadata == METADATA


def test_nothing_to_restore(checkpoints, tmp_path):
    empty = checkpoints()
    assert empty.restore("latest", abstract(make_state())) is None
    assert empty.restore("best", abstract(make_state())) is None
    assert empty.latest_step() is None
    assert empty.best_step() is None
    assert restore_variables(tmp_path, {}) is None
    assert restore_variables(tmp_path / "absent", {}) is None


def test_keeps_the_latest_and_one_best(checkpoints, tmp_path):
    run = checkpoints(keep=2)
    for step in (1, 2, 3):
        run.save_latest(step, make_state(step), {})
        if step != 3:
            run.save_best(step, make_state(step), {"accuracy": step})
    for each in (run, checkpoints()):
        assert each.latest_step() == 3
        assert each.best_step() == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["2"]
    best, metadata = run.restore("best", abstract(make_state()))
    assert_identical(best, make_state(2))
    assert metadata == {"accuracy": 2}


def test_a_step_that_exists_is_saved_again(checkpoints):
    run = checkpoints()
    run.save_latest(1, make_state(1), {})
    run.save_latest(1, make_state(1), {})
    run.save_best(5, make_state(5), {})

    resumed = checkpoints()
    state, _ = resumed.restore("latest", abstract(make_state()))
    resumed.save_latest(1, state, {})
    resumed.save_best(5, make_state(6), {"run": 2})  # of a run that was abandoned
    best, metadata = resumed.restore("best", abstract(make_state()))
    assert_identical(best, make_state(6))
    assert metadata == {"run": 2}


def test_a_run_that_went_back_forgets_later_steps(checkpoints):
    run = checkpoints(keep=2)
    run.save_latest(8, make_state(8), {})
    run.save_latest(9, make_state(9), {})
    run.save_latest(4, make_state(4), {})
    assert checkpoints().latest_step() == 4
    run.save_best(9, make_state(9), {})
    run.save_best(5, make_state(5), {})
    assert checkpoints().best_step() == 5


def test_variables_without_the_optimizer(checkpoints, tmp_path):
    run = checkpoints()
    state = make_state(4)
    run.save_best(4, state, METADATA)
    run.save_latest(6, make_state(6), {})
    before = sorted(tmp_path.rglob("*"))
    fields = {name: abstract(state)[name] for name in ("params", "batch_stats", "step")}
    variables, metadata = restore_variables(tmp_path, fields)
    assert_identical(variables, {name: state[name] for name in fields})
    assert metadata == METADATA
    latest, _ = restore_variables(tmp_path, fields, kind="latest")
    assert latest["step"] == 6
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match=r"absent/x is absent in it and float32\[2\] here"):
        restore_variables(tmp_path, {"absent": {"x": jax.ShapeDtypeStruct((2,), jnp.float32)}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"params": make_state(width=100)["params"]},
            r"params/block_0/kernel is float32\[16,200\] in it and float32\[16,100\] here",
        ),
        (
            lambda s: s | {"step": jnp.float32(0)},
            r"step is int32\[\] in it and float32\[\] here",
        ),
        (
            lambda s: s | {"ema": {"w": jnp.zeros(2)}},
            r"ema/w is absent in it and float32\[2\] here",
        ),
        (
            lambda s: s | {"batch_stats": {}},
            r"batch_stats/mean is float32\[200\] in it and absent here",
        ),
    ],
)
def test_a_state_that_does_not_fit(checkpoints, tmp_path, change, message):
    run = checkpoints()
    run.save_latest(1, make_state(), {})
    with pytest.raises(UserError, match=message) as raised:
        run.restore("latest", abstract(change(make_state())))
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "checkpoints" / "1") in str(raised.value)


def data_files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and p.parent != path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_files(checkpoints, tmp_path, damage):
    run = checkpoints()
    run.save_latest(1, make_state(1), METADATA)
    run.save_latest(2, make_state(2), METADATA)
    path = tmp_path / "checkpoints" / "2"
    whole = tmp_path / "whole"
    shutil.copytree(path, whole)
    assert any(p.stat().st_size > 10_000 for p in data_files(path))
    for file in [*data_files(path), path / "checksums.json"]:
        content = file.read_bytes()
        if damage == "truncate":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            middle = len(content) // 2
            flipped = bytes([content[middle] ^ 0x10])
            file.write_bytes(content[:middle] + flipped + content[middle + 1 :])
        elif file.parent != path:
            file.unlink()
        else:
            continue  # see test_without_checksums_a_step_is_invisible
        for read in (
            lambda: run.restore("latest", abstract(make_state())),
            lambda: restore_variables(tmp_path, {}, kind="latest"),
        ):
            with pytest.raises(UserError, match="is damaged") as raised:
                read()
            assert str(path) in str(raised.value)
            assert "\n" not in str(raised.value)
        shutil.rmtree(path)
        shutil.copytree(whole, path)
    assert_identical(run.restore("latest", abstract(make_state()))[0], make_state(2))

    shutil.rmtree(path)  # what the message advises
    resumed = checkpoints()
    assert_identical(resumed.restore("latest", abstract(make_state()))[0], make_state(1))


def test_without_checksums_a_step_is_invisible(checkpoints, tmp_path):
    run = checkpoints()
    run.save_latest(1, make_state(1), {})
    run.save_latest(2, make_state(2), {})
    unfinished = tmp_path / "checkpoints" / "2"
    (unfinished / "checksums.json").unlink()
    shutil.rmtree(unfinished / "state" / "d")
    left_over = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    left_over.mkdir()

    resumed = checkpoints()
    assert resumed.latest_step() == 1
    assert_identical(resumed.restore("latest", abstract(make_state()))[0], make_state(1))
    resumed.save_latest(2, make_state(2), {})
    assert not left_over.exists()
    assert_identical(checkpoints().restore("latest", abstract(make_state()))[0], make_state(2))


def test_a_directory_that_cannot_be_written(checkpoints, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write checkpoints to [^\n]*$"):
        Checkpoints(tmp_path / "file", 2)
    with pytest.raises(UserError, match=r"^cannot write checkpoints to [^\n]*$"):
        Checkpoints(Path("/proc/absent"), 2)


def run_python(code: str, *args: object, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from bvit_jax.checkpoint import Checkpoints
from bvit_jax.errors import UserError

run = Checkpoints(Path(sys.argv[1]), 1)
run.save_latest(1, {"w": jnp.ones(3)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    run.save_latest(2, {"w": np.random.default_rng(0).random((300, 300))}, {})
except UserError as error:
    print("error:", error)
assert Checkpoints(Path(sys.argv[1]), 1).latest_step() == 1
"""


def test_a_full_disk(tmp_path):
    process = run_python(FULL_DISK, tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "error: cannot write checkpoints to" in output
    assert "File too large" in output  # the limit set here; a full disk says "No space left"


SHARDINGS = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from bvit_jax.checkpoint import Checkpoints, restore_variables

def mesh(*shape):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, ("x", "y"), axis_types=(AxisType.Auto,) * 2)

def struct(shape, dtype, mesh, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

assert jax.device_count() == 8
w = jnp.arange(64 * 24, dtype=jnp.bfloat16).reshape(64, 24)
saved = jax.device_put(w, NamedSharding(mesh(4, 2), P("x", "y")))
one = jax.device_put(jnp.int32(5), NamedSharding(mesh(4, 2), P()))
run = Checkpoints(Path(sys.argv[1]), 1)
run.save_latest(1, {"w": saved, "step": one}, {})
for wanted, spec in ((mesh(1, 1), P()), (mesh(1, 8), P("y")), (mesh(2, 2), P(None, "x"))):
    abstract = {
        "w": struct((64, 24), jnp.bfloat16, wanted, spec),
        "step": struct((), jnp.int32, wanted, P()),
    }
    for state, _ in (
        run.restore("latest", abstract),
        restore_variables(Path(sys.argv[1]), abstract, kind="latest"),
    ):
        assert state["w"].sharding == abstract["w"].sharding
        assert state["step"].sharding == abstract["step"].sharding
        assert np.asarray(state["w"]).tobytes() == np.asarray(w).tobytes()
        assert state["step"] == 5
print("passed")
"""


def test_restores_onto_other_shardings(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    process = run_python(SHARDINGS, tmp_path, XLA_FLAGS=flags)
    output, _ = process.communicate(timeout=120)
    assert output.strip().endswith("passed"), output


SAVE_FOREVER = """
import itertools, sys
from pathlib import Path
import jax.numpy as jnp
from bvit_jax.checkpoint import Checkpoints

run = Checkpoints(Path(sys.argv[1]), 1)
first = (run.latest_step() or 0) + 1
for step in itertools.count(first):
    run.save_latest(step, {"w": jnp.full((500, 500), step)}, {"step": step})
    run.save_best(step, {"w": jnp.full((500, 500), step)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    last = 0
    for attempt in range(4):
        process = run_python(SAVE_FOREVER, tmp_path)
        assert process.stdout is not None
        # Among the numbers Orbax may warn of what the last kill left unfinished.
        last = next(int(line) for line in process.stdout if line.strip().isdecimal())
        time.sleep(0.11 * attempt)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().splitlines()
        process.wait()
        process.stdout.close()
        last = max([last, *(int(line) for line in rest if line.isdecimal())])
        fields = {"w": jnp.zeros((500, 500), int)}
        for kind in ("latest", "best"):
            variables, metadata = restore_variables(tmp_path, abstract(fields), kind=kind)
            assert last <= metadata["step"] <= last + 1
            assert (variables["w"] == metadata["step"]).all()
    run = Checkpoints(tmp_path, 1)  # what was left unfinished is gone with the next step
    run.save_latest(last + 5, fields, {})
    run.save_best(last + 5, fields, {})
    run.close()
    for folder in ("checkpoints", "best"):
        assert [p.name for p in (tmp_path / folder).iterdir()] == [str(last + 5)]
