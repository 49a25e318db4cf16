"""What may happen to a run: every fault with real processes, and what becomes of it.

After each fault the run ends equal to the unbroken one, or it stops with the documented error and
has lost nothing older.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.processes import (
    assert_same_runs,
    cluster_flags,
    final_state,
    finish,
    metrics_of,
    run,
    run_until,
    start,
    start_many,
    training_flags,
    wait_for,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The workdir of an unbroken run: 18 steps, evaluated at 9 and 18, saved every 5."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert run("train.py", *training_flags(workdir, data_dir)).returncode == 0
    return workdir


@pytest.fixture
def flags(tmp_path: Path, data_dir: Path) -> list[str]:
    """Of a run in ``tmp_path / "run"``."""
    return training_flags(tmp_path / "run", data_dir)


def assert_continues(flags: list[str], workdir: Path, whole: Path) -> str:
    """Runs the command again and compares its end with the unbroken run's; returns its log."""
    result = run("train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert_same_runs(workdir, whole)
    return result.stderr


# --- killed -------------------------------------------------------------------------------------


def test_killed_while_saving(flags: list[str], tmp_path: Path, whole: Path) -> None:
    process = start("train.py", *flags)
    folder = tmp_path / "run" / "checkpoints"
    while not list(folder.glob("10.*")):  # what Orbax writes before it takes its name
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    finish(process)
    assert not (folder / "10" / "checksums.json").exists()
    assert "continuing from step" in assert_continues(flags, tmp_path / "run", whole)


def test_killed_in_evaluation(flags: list[str], tmp_path: Path, whole: Path) -> None:
    run_until("step 9/18  epoch", *flags)
    assert_continues(flags, tmp_path / "run", whole)


# --- asked to stop ------------------------------------------------------------------------------


def test_sigterm_in_training(flags: list[str], tmp_path: Path, whole: Path) -> None:
    log = run_until("step 12/18", *flags, number=signal.SIGTERM).stderr
    assert "stopped by SIGTERM at step 1" in log.splitlines()[-1]
    step = log.split("stopped by SIGTERM at step ")[1].split(";")[0]
    assert f"continuing from step {step} " in assert_continues(flags, tmp_path / "run", whole)


def test_sigterm_in_evaluation(flags: list[str], tmp_path: Path, whole: Path) -> None:
    log = run_until("step 9/18  epoch", *flags, number=signal.SIGTERM).stderr
    assert "stopped by SIGTERM at step 9;" in log
    assert "top-1" not in log
    again = assert_continues(flags, tmp_path / "run", whole)
    assert "continuing from step 9 " in again
    assert again.count("top-1") == 2


def test_sigterm_in_the_last_evaluation(flags: list[str], tmp_path: Path, whole: Path) -> None:
    run_until("step 18/18  epoch", *flags, number=signal.SIGTERM)
    result = run("train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert_same_runs(tmp_path / "run", whole)
    best = json.loads(run("eval.py", f"--workdir={tmp_path / 'run'}", "--checkpoint=best").stdout)
    printed = json.loads(result.stdout)
    assert (best["step"], best["top1"]) == (printed["best_step"], printed["best_top1"])


def test_sigterm_in_compilation(flags: list[str], tmp_path: Path, whole: Path) -> None:
    slow = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "empty")}
    log = run_until("compiling", *flags, number=signal.SIGTERM, **slow).stderr
    assert "stopped by SIGTERM at step 0;" in log
    assert "compiled" not in log
    assert "continuing" not in assert_continues(flags, tmp_path / "run", whole)


# --- damaged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint(damage: str, data_dir: Path, tmp_path: Path, whole: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    newest = workdir / "checkpoints" / "18"
    file = max(newest.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    file.write_bytes(content[:middle] if damage == "truncated" else flipped)
    log = assert_continues(training_flags(workdir, data_dir), workdir, whole)
    assert f"checkpoint {newest} is damaged" in log
    assert "continuing from step 15 " in log


# --- no room ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk: Path, data_dir: Path, whole: Path) -> None:
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    flags = training_flags(workdir, data_dir)
    run_until("saved step 5", *flags)
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    result = run("train.py", *flags)
    assert result.returncode == 1
    assert "cannot write checkpoints to" in result.stderr.splitlines()[-1]
    assert "No space left on device; make room" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    ballast.unlink()
    assert_continues(flags, workdir, whole)


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])  # seconds: between, before and within saves
def test_a_directory_that_is_gone(delay: float, flags: list[str], tmp_path: Path) -> None:
    process = start("train.py", *flags, "--config.epochs=200")  # long enough for any machine
    wait_for(process, "saved step 5")
    time.sleep(delay)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    result = finish(process)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: cannot write ")
    assert "Traceback" not in result.stderr


# --- other devices ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The workdir of an unbroken run of a real model: its sums may be reordered without flipping signs."""
    workdir = tmp_path_factory.mktemp("runs") / "real"
    assert run("train.py", *training_flags(workdir, data_dir, ":real")).returncode == 0
    return workdir


def assert_close(workdir: Path, whole: Path) -> None:
    """Asserts that two runs agree up to the order of their sums."""
    lines, expected = metrics_of(workdir), metrics_of(whole)
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=1e-5), (line["step"], name)
    ours, theirs = final_state(workdir), final_state(whole)
    for name, array in theirs.items():
        if "['key']['bias']" in name:  # has no influence, and follows the rounding noise of its gradient
            continue
        scale = np.max(np.abs(array), initial=1e-6)
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(("before", "after", "fsdp"), [(1, 4, 2), (4, 2, 1)])
def test_continues_on_other_devices(
    before: int, after: int, fsdp: int, tmp_path: Path, data_dir: Path, real: Path
) -> None:
    flags = training_flags(tmp_path / "run", data_dir, ":real")
    killed = start("train.py", *flags, devices=before)
    wait_for(killed, "saved step 10")
    killed.kill()
    finish(killed)
    result = run("train.py", *flags, f"--config.mesh.fsdp={fsdp}", devices=after)
    assert result.returncode == 0, result.stderr
    assert "continuing from step 1" in result.stderr
    assert_close(tmp_path / "run", real)


# --- several processes --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_equal_one(count: int, tmp_path: Path, data_dir: Path, real: Path) -> None:
    results = [
        finish(process) for process in start_many(count, *training_flags(tmp_path / "run", data_dir, ":real"))
    ]
    for index, result in enumerate(results):
        assert result.returncode == 0, result.stderr
        assert f"process {index} of {count} on " in result.stderr
        assert ("step 18/18" in result.stderr) == (index == 0)
        assert ("best_top1" in result.stdout) == (index == 0)
    assert_close(tmp_path / "run", real)


def test_continues_as_two_processes(tmp_path: Path, data_dir: Path, real: Path) -> None:
    flags = training_flags(tmp_path / "run", data_dir, ":real")
    run_until("saved step 10", *flags)
    for result in [finish(process) for process in start_many(2, *flags)]:
        assert result.returncode == 0, result.stderr
    assert_close(tmp_path / "run", real)


# A run whose second process dies: after a logged step, or before it says that its checkpoint is written.
DIES = """
import functools, os, runpy, sys
import jax
from bvit_jax import checkpoint

def die(self):
    if self._current == 5:
        self._finisher.join()
        os._exit(9)

jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds={limit})
if "--process_id=1" in sys.argv and {in_training}:
    checkpoint.Checkpoints.check = die
elif "--process_id=1" in sys.argv:
    checkpoint.ocp.multihost.get_barrier_sync_fn = lambda **kwargs: lambda **kwargs: os._exit(9)
sys.path[0], sys.argv[0] = os.getcwd(), os.path.abspath("train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def error_of_a_lost_host(script: Path, flags: list[str], *, in_training: bool) -> str:
    """Runs two processes of which the second dies; returns what the first said."""
    script.write_text(DIES.format(in_training=in_training, limit=100 if in_training else 5))
    first, second = (start(str(script), *flags, *own) for own in cluster_flags(2))
    assert finish(second).returncode == 9
    result = finish(first)
    assert result.returncode != 0
    return result.stderr


def test_a_host_that_dies_and_one_that_starts_late(tmp_path: Path, data_dir: Path, real: Path) -> None:
    flags = training_flags(tmp_path / "run", data_dir, ":real")
    log = error_of_a_lost_host(tmp_path / "train.py", flags, in_training=True)
    last = log.splitlines()[-1]
    assert last.startswith("error: the other processes of the run do not answer"), log
    assert last.endswith("start all of them again")

    own = cluster_flags(2)
    early = start("train.py", *flags, *own[0])
    time.sleep(4)
    late = start("train.py", *flags, *own[1])
    logs = []
    for result in (finish(early), finish(late)):
        assert result.returncode == 0, result.stderr
        logs.append(result.stderr)
    assert "continuing from step 5 " in logs[0]
    assert_close(tmp_path / "run", real)


def test_a_host_that_dies_before_a_barrier(tmp_path: Path, data_dir: Path) -> None:
    """Missed heartbeats tell it; jax then aborts the other process, as a rule after its last line."""
    flags = training_flags(tmp_path / "run", data_dir, ":real")
    log = error_of_a_lost_host(tmp_path / "train.py", flags, in_training=False)
    told = [line for line in log.splitlines() if line.startswith("error: the other processes of the run do")]
    if told:
        assert log.splitlines()[-1] == told[0]
        assert told[0].endswith("start all of them again")
    else:  # jax was first
        assert "stopped sending heartbeats" in log


def test_sigterm_to_one_of_two(tmp_path: Path, data_dir: Path, real: Path) -> None:
    flags = training_flags(tmp_path / "run", data_dir, ":real")
    first, second = start_many(2, *flags)
    wait_for(first, "step 6/18")
    second.terminate()
    steps = set()
    for result in (finish(first), finish(second)):
        assert result.returncode == 128 + signal.SIGTERM, result.stderr
        steps.add(result.stderr.split("stopped by SIGTERM at step ")[1].split(";")[0])
    assert len(steps) == 1
    result = run("train.py", *flags)
    assert f"continuing from step {steps.pop()} " in result.stderr
    assert_close(tmp_path / "run", real)


@pytest.mark.parametrize("there", [0, 1])
def test_a_host_that_never_starts(there: int, flags: list[str]) -> None:
    result = run("train.py", *flags, *cluster_flags(2, timeout=2)[there])
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: process {there} of 2 has waited 2 seconds at --coordinator=127.0.0.1:")
    for flag in ("--num_processes", "--process_id", "--coordinator", "--startup_timeout"):
        assert flag in line


def test_processes_of_different_runs(tmp_path: Path, data_dir: Path) -> None:
    own = cluster_flags(2)
    flags = training_flags(tmp_path / "run", data_dir)
    processes = [
        start("train.py", *flags, *own[0]),
        start("train.py", *flags, *own[1], "--config.optim.weight_decay=0.5"),
    ]
    for result in [finish(process) for process in processes]:
        assert result.returncode == 1
        assert "process 1 has another configuration than process 0" in result.stderr
    assert not (tmp_path / "run").exists()


def test_hosts_that_do_not_share_the_workdir(tmp_path: Path, data_dir: Path) -> None:
    own = cluster_flags(2)
    processes = [
        start("train.py", *training_flags(tmp_path / str(index), data_dir), *own[index]) for index in range(2)
    ]
    for result in [finish(process) for process in processes]:
        assert result.returncode == 1
        assert "process 1 does not see" in result.stderr
        assert "must be on a file system that all hosts share" in result.stderr


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--coordinator=10.0.0.1:1234"], "--num_processes, --process_id must be given too"),
        (["--coordinator=nowhere", "--num_processes=2", "--process_id=0"], "expected HOST:PORT"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "--process_id is 2; expected 0 to 1"),
        (["--distributed"], "no cluster was found"),
        (["--nodistributed", "--num_processes=2"], "--nodistributed excludes"),
    ],
)
def test_wrong_cluster_flags(own: list[str], message: str, flags: list[str]) -> None:
    result = run("train.py", *flags, *own)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


# --- NaN ----------------------------------------------------------------------------------------


def test_debug_nans_names_the_operation(flags: list[str]) -> None:
    result = run("train.py", *flags, "--config.optim.learning_rate=1e30", "--debug_nans")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: invalid value (nan) encountered in sub, at bvit_jax/fused.py:")
    assert "(centred = x - jnp.expand_dims(mean, axes)), called from bvit_jax/" in last
