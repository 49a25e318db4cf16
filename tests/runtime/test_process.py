"""Signals to processes of a command's own: one line, the status of the signal, nothing half written."""

import signal
import subprocess
import sys
import time

import pytest

from bvit_jax.runtime import process
from tests.processes import ROOT

# A command that does some work, in a process that imports no JAX.
PROGRAM = """
import ctypes, gc, os, re, signal, sys, time
from bvit_jax import cli
from bvit_jax.runtime import process

def ready():
    print("ready", flush=True)

def wait(seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)

def in_python(arguments):
    try:
        ready()
        wait()
    finally:
        print("tidied", flush=True)

def in_code_that_makes_an_error_of_it(arguments):
    try:
        in_python(arguments)
    except BaseException:
        raise ImportError("half imported")

class SlowFinder:
    @staticmethod
    def find_spec(*arguments):
        ready()
        wait()

def in_an_import(arguments):
    sys.meta_path.insert(0, SlowFinder)
    import slow

def in_a_callback_of_the_collector(arguments):
    def callback(phase, info):
        if phase == "start":
            ready()
            wait(1)
    gc.callbacks.append(callback)
    gc.collect()
    gc.callbacks.remove(callback)
    in_python(arguments)

def in_c(arguments):  # a mutex that is locked twice
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    ready()
    lock(mutex)

def aborted(arguments):
    process.answer_aborts(lambda said: "explained" if "peer" in said else "", re.compile(b"peer"))
    ready()
    os.write(2, b"E1127 peer\\nstack\\n" if arguments[0] == "peer" else b"F1127 other\\nstack\\n")
    os.abort()

process.PATIENCE = float(sys.argv.pop())
command = sys.argv.pop(1)
cli.COMMANDS["work"] = cli.Command("", globals()[command])
assert "jax" not in sys.modules
cli.run("work")
"""


# Of a process as a terminal starts it: the TPU's compiler, once loaded, lets all children ignore SIGHUP.
HEARS = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"


def started(work: str, *arguments: str, patience: float = 60, before: str = HEARS) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", before + PROGRAM, work, *arguments, str(patience)]
    child = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("number", process.STOPS, ids=lambda number: number.name)
@pytest.mark.parametrize("work", ["in_python", "in_code_that_makes_an_error_of_it"])
def test_a_signal_ends_a_command_which_tidies_up(work: str, number: signal.Signals) -> None:
    child = started(work)
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert (out, err) == ("tidied\n", f"stopped by {number.name}; run the same command again\n")
    assert child.returncode == 128 + number


def test_ctrl_c_in_an_import() -> None:
    """C++ code of a module may abort the process when it sees an exception."""
    child = started("in_an_import")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, "stopped by SIGINT; run the same command again\n")


def test_ctrl_c_is_not_swallowed_by_a_callback_of_the_collector() -> None:
    child = started("in_a_callback_of_the_collector")
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert (out.split()[-1], err) == ("tidied", "stopped by SIGINT; run the same command again\n")
    assert child.returncode == 130


@pytest.mark.parametrize(("times", "patience"), [(2, 60), (1, 0.2)])
def test_ctrl_c_while_c_computes(times: int, patience: float) -> None:
    """Twice it ends the process at once; once, when Python does not come to see it."""
    child = started("in_c", patience=patience)
    for _ in range(times):
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, "stopped by SIGINT; run the same command again\n")


def test_what_nohup_ignores_stays_ignored() -> None:
    child = started("in_python", before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    child.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert child.poll() is None
    child.terminate()
    child.communicate(timeout=20)
    assert child.returncode == 143


@pytest.mark.parametrize(
    ("reason", "status", "err"),
    [("peer", 1, "error: explained\n"), ("other", -signal.SIGABRT, "F1127 other\nstack\n")],
)
def test_an_abort_in_c(reason: str, status: int, err: str) -> None:
    """One line where the reason is known, else what C++ has said."""
    child = started("aborted", reason)
    _, said = child.communicate(timeout=20)
    assert child.returncode == status
    assert said == err if reason == "peer" else err in said


def test_processes_that_load_data_leave_ctrl_c_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    def elements():
        yield signal.pthread_sigmask(signal.SIG_BLOCK, ())
        yield signal.pthread_sigmask(signal.SIG_BLOCK, ())

    monkeypatch.setattr(process, "_ours", True)
    assert [signal.SIGINT in mask for mask in process.leave_ctrl_c_to_us(elements())] == [True, False]
