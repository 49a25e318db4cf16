"""One run at a time in a workdir: a file that names the process, renewed while it lives."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from bvit_jax.errors import UserError
from bvit_jax.files import create_file, read_json, replace_file
from bvit_jax.workdir.collectives import on_first_process

NAME = "run.lock"
RENEW_SECONDS = 20
WATCH_SECONDS = 90  # file systems of buckets may show what was written a minute ago

logger = logging.getLogger(__name__)


class Lock:
    """The right to write to a workdir, which is made; ``close`` it to give it back. All processes call this.

    A lock of a process that is gone is taken over: on this machine at once, of another machine once it has
    not been renewed for `WATCH_SECONDS`, whatever the clocks say.

    Raises:
      UserError: another run goes on in the workdir, or it cannot be written.
    """

    def __init__(self, workdir: Path) -> None:
        self._path = workdir / NAME
        self._workdir = workdir
        self._own: dict[str, Any] = {}
        self._lost = False
        self._closed = threading.Event()
        on_first_process(self._take)
        if jax.process_index() == 0:
            self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Raises `UserError` if another run has taken the workdir, as while this process was suspended."""
        if self._lost or self._is_another_runs():
            raise UserError(
                f"another run has taken {self._workdir} while this one did not answer; this one stops, and"
                " nothing of the other is overwritten"
            )

    def close(self) -> None:
        """Removes the lock, unless another run has it."""
        if jax.process_index() == 0:
            self._closed.set()
            self._thread.join()
            if self._is_ours():
                with contextlib.suppress(OSError):  # of a disk that is gone or read-only, which has been said
                    self._path.unlink()

    def _take(self) -> None:
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create the workdir {self._workdir}: {error.strerror}; choose another --workdir"
            ) from error
        other = _read(self._path)
        if other is not None and _lives(self._path, other):
            raise _taken(self._workdir, other)
        self._own = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": _machine(),
            "birth": _birth(os.getpid()),
            "path": str(self._path.resolve()),
        }
        try:
            if other is not None:
                self._remove(other)
            create_file(self._path, json.dumps(self._own).encode())  # of two that come together, one
        except FileExistsError as error:
            raise _taken(self._workdir, _read(self._path) or {}) from error
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; make room or choose another --workdir"
            ) from error

    def _remove(self, stale: dict[str, Any]) -> None:
        """Removes a lock of a process that is gone, but not what another start has put in its place."""
        aside = self._path.with_name(f".{os.urandom(8).hex()}.{NAME}")
        try:
            self._path.rename(aside)  # of two that come together, one
        except FileNotFoundError:
            return
        found = _read(aside)
        if found != stale:
            aside.rename(self._path)
            raise _taken(self._workdir, found or {})
        aside.unlink()

    def _renew(self) -> None:
        beat = 0
        while not self._closed.wait(RENEW_SECONDS):
            if self._is_another_runs():
                self._lost = True
                return
            beat += 1
            try:
                replace_file(self._path, json.dumps({**self._own, "beat": beat}).encode())
            except OSError:  # a disk that is full or away; the run itself finds out
                continue

    def _is_another_runs(self) -> bool:
        return bool(self._own and _read(self._path) and not self._is_ours())

    def _is_ours(self) -> bool:
        return {**(_read(self._path) or {}), "beat": 0} == {**self._own, "beat": 0}


def _read(path: Path) -> dict[str, Any] | None:
    """Returns what a lock says, nothing if it is damaged, and None if there is none."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _lives(path: Path, other: dict[str, Any]) -> bool:
    """Returns whether the process that a lock names still runs, in this workdir."""
    if _machine() and other.get("machine") == _machine():
        same = other.get("path") == str(path.resolve())  # not in one that this is a copy of
        return same and bool(_birth(other.get("process"))) and _birth(other["process"]) == other.get("birth")
    logger.info(
        "%s is of process %s on %s; watching for %d seconds whether it goes on",
        path,
        other.get("process", "?"),
        other.get("host", "?"),
        WATCH_SECONDS,
    )
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1, WATCH_SECONDS / 10))
        now = _read(path)
        if now != other:
            return now is not None
    return False


def _taken(workdir: Path, other: dict[str, Any]) -> UserError:
    return UserError(
        f"another run goes on in {workdir}: process {other.get('process', '?')} on"
        f" {other.get('host', '?')}, since {other.get('since', '?')}; wait for its end, stop it, or choose"
        " another workdir"
    )


def _machine() -> str:
    """Returns what identifies this machine, since its last start, and its processes; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _birth(process: Any) -> str:
    """Returns when a process of this machine began, in ticks of its clock; "" if it does not run."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "XZ" else fields[18]
