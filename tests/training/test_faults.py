"""Failures that only real processes show: kills, signals, a full disk, hosts that are lost.

After each failure the run ends equal to the unbroken one, or it stops with the documented error and has lost
nothing older. All other events are in `tests.training.test_interrupted`, in this process.
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

from bvit_jax.errors import UserError
from bvit_jax.runtime import distributed
from bvit_jax.runtime.distributed import Cluster
from bvit_jax.runtime.interruption import Interrupted
from tests.bucket import NAME, serving
from tests.configs import tiny
from tests.inprocess import Notice, Trained
from tests.processes import (
    assert_same_runs,
    cluster_flags,
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


# --- one process --------------------------------------------------------------------------------


def test_killed_while_saving_and_then_asked_to_stop(data_dir: Path, tmp_path: Path, whole: Path) -> None:
    flags = training_flags(tmp_path / "run", data_dir)
    process = start("train.py", *flags)
    folder = tmp_path / "run" / "checkpoints"
    while not list(folder.glob("10.*")):  # what Orbax writes before it takes its name
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    finish(process)
    assert not (folder / "10" / "checksums.json").exists()

    log = run_until("step 12/18", *flags, number=signal.SIGTERM).stderr
    assert "stopped by SIGTERM at step 1" in log.splitlines()[-1]
    step = log.split("stopped by SIGTERM at step ")[1].split(";")[0]
    result = run("train.py", *flags)
    assert result.returncode == 0, result.stderr
    assert f"continuing from step {step} " in result.stderr
    assert_same_runs(tmp_path / "run", whole)


# --- in a bucket ---------------------------------------------------------------------------------


def test_killed_twice_in_a_bucket(data_dir: Path, tmp_path: Path, whole: Path) -> None:
    with serving() as bucket:
        workdir = f"gs://{NAME}/runs/a"
        flags = [*training_flags(tmp_path, data_dir), f"--workdir={workdir}"]
        process = start("train.py", *flags, **bucket.variables())
        wait_for(process, "step 3/18")
        process.send_signal(signal.SIGSTOP)
        second = finish(start("train.py", *flags, **bucket.variables()))
        assert f"error: another run goes on in {workdir}: process {process.pid} on " in second.stderr
        process.send_signal(signal.SIGCONT)
        while "runs/a/checkpoints/10.unfinished" not in bucket.objects:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        finish(process)
        assert "runs/a/checkpoints/10/checksums.json" not in bucket.objects

        process = start("train.py", *flags, **bucket.variables())
        wait_for(process, f"continuing from step 9 in {workdir}")
        wait_for(process, "step 12/18")
        process.kill()
        finish(process)
        result = finish(start("train.py", *flags, **bucket.variables()))
        assert result.returncode == 0, result.stderr
        assert "runs/a/run.lock" not in bucket.objects

        arguments = (f"--workdir={workdir}", f"--data_dir={data_dir}")
        evaluated = finish(start("eval.py", *arguments, **bucket.variables()))
        assert json.loads(evaluated.stdout)["top1"] == json.loads(result.stdout)["top1"]
        for name, (content, _) in bucket.objects.items():
            file = tmp_path / "copy" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    assert_same_runs(tmp_path / "copy" / "runs" / "a", whole)


def test_a_bucket_that_cannot_be_read(data_dir: Path, tmp_path: Path) -> None:
    flags = [*training_flags(tmp_path, data_dir), f"--workdir=gs://{NAME}/run"]
    (tmp_path / "gcsfs.py").write_text("raise ImportError")
    result = finish(start("train.py", *flags, PYTHONPATH=str(tmp_path)))
    assert result.stderr == (
        f"error: cannot read gs://{NAME}/run: gcsfs is missing; pip install 'bvit_jax[gcs]'; choose another"
        " --workdir\n"
    )


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


def test_a_full_disk(small_disk: Path, real: Trained) -> None:
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    with pytest.raises(Interrupted):
        real.train(workdir, Notice(6))
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    with pytest.raises(UserError, match=r"cannot write checkpoints to .* No space left on device; make room"):
        real.train(workdir)
    ballast.unlink()
    real.assert_continues(workdir)


# --- several devices ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Trained:
    """An unbroken run of a real model: its sums may be reordered without flipping signs."""
    config = tiny.get_config("real")
    config.data.data_dir = str(data_dir)
    return Trained(config, tmp_path_factory.mktemp("runs") / "real")


def back_to(step: int, real: Trained, workdir: Path) -> None:
    """Makes a copy of the run whose newest checkpoint is that of ``step``."""
    shutil.copytree(real.workdir, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def assert_close(workdir: Path, real: Trained) -> None:
    """Asserts that two runs agree up to the order of their sums."""
    lines, expected = metrics_of(workdir), metrics_of(real.workdir)
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=1e-5), (line["step"], name)
    ours = real.final_state(workdir)
    for name, array in real.state.items():
        if "['key']['bias']" in name:  # has no influence, and follows the rounding noise of its gradient
            continue
        scale = np.max(np.abs(array), initial=1e-6)
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(("devices", "fsdp"), [(4, 2), (2, 1)])
def test_continues_on_other_devices(devices: int, fsdp: int, tmp_path: Path, real: Trained) -> None:
    back_to(15, real, tmp_path / "run")
    real.train(tmp_path / "run", run=real.build(devices, fsdp))
    assert_close(tmp_path / "run", real)


# --- several processes --------------------------------------------------------------------------


def test_two_processes_continue_what_one_began(tmp_path: Path, data_dir: Path, real: Trained) -> None:
    back_to(15, real, tmp_path / "run")
    processes = start_many(2, *training_flags(tmp_path / "run", data_dir, ":real"))
    for index, result in enumerate([finish(process) for process in processes]):
        assert result.returncode == 0, result.stderr
        assert f"process {index} of 2 on " in result.stderr
        assert ("step 18/18" in result.stderr) == (index == 0)
        assert ("best_top1" in result.stdout) == (index == 0)
    assert_close(tmp_path / "run", real)


# A run one of whose processes dies after a logged step.
DIES = """
import os, runpy, sys
sys.path[0] = os.getcwd()
from bvit_jax.workdir.checkpoint import Checkpoints

def die(self):
    if self._current == 5:
        self._finisher.join()
        os._exit(9)

if os.environ["DIES"] in sys.argv:
    Checkpoints.check = die
sys.argv[0] = os.path.abspath("train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_dying(flag: str, directory: Path, flags: list[str]) -> list["subprocess.Popen[str]"]:
    """Starts two processes, of which that with ``flag`` dies."""
    script = directory / "train.py"
    script.write_text(DIES)
    return [start(str(script), *flags, *own, DIES=flag) for own in cluster_flags(2)]


def test_the_first_host_dies(tmp_path: Path, data_dir: Path) -> None:
    """It is the coordinator, without which JAX aborts the others."""
    flags = training_flags(tmp_path / "run", data_dir, ":real")
    first, second = start_dying("--process_id=0", tmp_path, flags)
    assert finish(first).returncode == 9
    result = finish(second)
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[Gloo]")]
    assert lines[0].split(" ", 1)[1].startswith("process 1 of 2 on ")
    assert [line[:43] for line in lines[1:]] == ["error: process 0 of the run does not answer"]


def test_a_host_that_dies_and_one_that_starts_late(tmp_path: Path, data_dir: Path, real: Trained) -> None:
    flags = training_flags(tmp_path / "run", data_dir, ":real")
    first, second = start_dying("--process_id=1", tmp_path, flags)
    assert finish(second).returncode == 9
    result = finish(first)
    assert result.returncode != 0
    log = result.stderr
    last = log.splitlines()[-1]
    assert last.startswith("error: process 1 of the run does not answer"), log
    assert last.endswith("start all of them again")

    own = cluster_flags(2)
    early = start("train.py", *flags, *own[0])
    time.sleep(4)
    late = start("train.py", *flags, *own[1])
    logs = []
    for result in (finish(early), finish(late)):
        assert result.returncode == 0, result.stderr
        logs.append(result.stderr)
    assert_close(tmp_path / "run", real)


def test_sigterm_to_one_of_two(tmp_path: Path, data_dir: Path, real: Trained) -> None:
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


def test_a_host_that_never_starts(tmp_path: Path, data_dir: Path) -> None:
    flags = training_flags(tmp_path / "run", data_dir)
    result = run("train.py", *flags, *cluster_flags(2, timeout=2)[0])
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: process 0 of 2 has waited 2 seconds at --coordinator=127.0.0.1:")
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
    ("cluster", "wanted", "message"),
    [
        (Cluster("10.0.0.1:1234"), None, "--num_processes, --process_id must be given too"),
        (Cluster("nowhere", 2, 0), None, "expected HOST:PORT"),
        (Cluster("a:1", 2, 2), None, "--process_id is 2; expected 0 to 1"),
        (Cluster(num_processes=2), False, "--nodistributed excludes"),
    ],
)
def test_wrong_cluster_flags(cluster: Cluster, wanted: bool | None, message: str) -> None:
    with pytest.raises(UserError) as error:
        distributed.start(cluster, wanted)
    assert message in str(error.value)


def test_no_cluster(tmp_path: Path, data_dir: Path) -> None:
    flags = training_flags(tmp_path / "run", data_dir)
    result = run("train.py", *flags, "--distributed")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no cluster was found")
