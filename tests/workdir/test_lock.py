"""One run at a time in a workdir; locks of processes that are gone are taken over."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bvit_jax import files
from bvit_jax.errors import UserError
from bvit_jax.workdir import lock
from bvit_jax.workdir.lock import NAME, Lock


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    first = Lock(tmp_path / "run")
    with pytest.raises(UserError, match=f"another run goes on in .*: process {os.getpid()} on .*; wait for"):
        Lock(tmp_path / "run")
    first.check()
    first.close()
    assert list((tmp_path / "run").iterdir()) == []
    Lock(tmp_path / "run").close()


def write(workdir: Path, **values: object) -> None:
    """Writes the lock that a living process would have, some of its values changed."""
    own = Lock(workdir)
    content = json.loads((workdir / NAME).read_text())
    own.close()
    (workdir / NAME).write_text(json.dumps({**content, **values}))


def test_a_process_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":  # not waited for
        time.sleep(0.01)
    write(tmp_path, process=process.pid)
    Lock(tmp_path).close()
    process.wait()
    write(tmp_path, process=process.pid)
    Lock(tmp_path).close()
    write(tmp_path, birth="1")  # its number is that of another process now
    Lock(tmp_path).close()
    write(tmp_path, path="/elsewhere/run.lock")  # a copy of a workdir
    Lock(tmp_path).close()


@pytest.mark.parametrize("content", ["", "[", "[]", "[" * 100_000, '{"machine": "other", "process": 1}'])
def test_of_another_machine_only_a_lock_that_is_not_renewed_is_taken(content: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(content)
    Lock(tmp_path).close()


def test_a_lock_of_another_machine_that_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Lock(tmp_path)
    monkeypatch.setattr(lock, "_machine", lambda: "another")
    with pytest.raises(UserError, match="another run goes on in"):
        Lock(tmp_path)
    other.close()


def test_of_two_that_take_over_at_once_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that a process is gone, and one removes its lock after the other has its own."""
    write(tmp_path, process=-1)
    stale = json.loads((tmp_path / NAME).read_text())
    monkeypatch.setattr(lock, "_lives", lambda *_: False)
    first = Lock(tmp_path)
    original, reads = lock._read, iter([stale])
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_read", lambda path: next(reads, None) or original(path))
        with pytest.raises(UserError, match=f"another run goes on in .*: process {os.getpid()} on"):
            Lock(tmp_path)
    assert first._is_ours()
    first.close()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fdopen", fail)
        with pytest.raises(UserError, match=r"cannot write .*run.lock: No space left on device; make room"):
            Lock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    Lock(tmp_path).close()


def test_a_lock_that_cannot_be_removed_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    own = Lock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        own.close()
    assert (tmp_path / NAME).exists()


def test_a_run_whose_workdir_was_taken_stops(tmp_path: Path) -> None:
    first = Lock(tmp_path)
    while "beat" not in (tmp_path / NAME).read_text():
        time.sleep(0.01)
    taken = '{"process": 1, "host": "other"}'
    (tmp_path / NAME).write_text(taken)
    with pytest.raises(UserError, match=r"another run has taken"):  # also before it is renewed
        first.check()
    deadline = time.monotonic() + 10
    while not first._lost and time.monotonic() < deadline:
        (tmp_path / NAME).write_text(taken)  # as after this process was suspended
        time.sleep(0.02)
    with pytest.raises(UserError, match=r"another run has taken .* while this one did not answer"):
        first.check()
    first.close()
    assert (tmp_path / NAME).read_text() == taken
