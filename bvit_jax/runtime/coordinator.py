"""Whether the coordinator of a run of several processes can be what it must be: one, ours, and alive."""

import contextlib
import os
import re
import socket
import sys
import threading
import time

from bvit_jax.errors import UserError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # of an HTTP/2 client
SETTINGS = 4  # the type of a server's first frame
PROBE_SECONDS, GONE_SECONDS, POLL_SECONDS = 3, 15, 1
# Messages about the other processes of a run, of which `explain` makes one line.
SAID_OF_OTHERS = re.compile(rb"[Cc]oordination|distributed service")
_OTHER_PORT = "choose a port that is free, the same for all processes"
_AGAIN = "start all processes again, each with a --process_id of its own"

_claims: list[socket.socket] = []  # held until the process ends


def claim(coordinator: str, process_id: int) -> None:
    """Takes the number of a process, and for process 0 makes sure that its port is free.

    Raises:
      UserError: another process of this machine has the number, or another program the port.
    """
    if sys.platform == "linux":  # a name that goes with the process
        name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            name.bind(f"\0bvit_jax {coordinator} {process_id}")
        except OSError as error:
            name.close()
            raise UserError(
                f"a process with --process_id={process_id} and --coordinator={coordinator} is running on this"
                " machine; give each process of a run its own number, and each run its own port"
            ) from error
        _claims.append(name)
    if process_id == 0:
        _check_port(int(coordinator.rpartition(":")[2]))


def watch(address: str, timeout: float, late: str, done: threading.Event) -> str:
    """Probes the coordinator, if its address is given, while another process than the first waits for it.

    Args:
      address: ``HOST:PORT``, or "" to wait only.
      timeout: seconds to wait.
      late: what to return afterwards.
      done: set when the wait is over.

    Returns:
      What is wrong, "" if nothing is.
    """
    end = time.monotonic() + timeout
    seen, since, last = False, time.monotonic(), ""
    while not done.wait(min(POLL_SECONDS, timeout)):
        answer = _probe(address) if address else ""
        if answer != last:
            last, since = answer, time.monotonic()
        seen = seen or answer == "coordinator"
        lasts = time.monotonic() - since > GONE_SECONDS
        if answer == "program" and lasts:
            return f"another program than process 0 answers at --coordinator={address}; {_OTHER_PORT}"
        if answer == "" and seen and lasts:
            return f"process 0 at --coordinator={address} has ended; its last line says why; {_AGAIN}"
        if time.monotonic() >= end:
            return late
    return ""


def silent(said: str, index: int | None, count: int | None) -> str:
    """Returns a clause that says which processes do not answer, as far as that is known.

    Args:
      said: by JAX, which may name them.
      index, count: of this process and of all, if known.
    """
    tasks = {int(number) for number in re.findall(r"/task:(\d+)", said)} - {index}
    if count == 2 and index is not None:
        tasks = {1 - index}
    if not tasks:
        return "other processes of the run do not answer"
    if len(tasks) == 1:
        return f"process {tasks.pop()} of the run does not answer"
    return f"processes {', '.join(map(str, sorted(tasks)))} of the run do not answer"


def explain(index: int | None, count: int | None, said: str) -> str:
    """Returns the message for what JAX said before it aborted a process of a run, "" if that is unknown."""
    again = re.search(r"(\d+) unexpectedly tried to connect", said)
    if again:
        return f"two processes have --process_id={again[1]}, or it was started again alone; {_AGAIN}"
    if re.search("distributed service|[Cc]oordination", said):
        return f"{silent(said, index, count)}: see the last line of each; {_AGAIN}"
    return ""


def _check_port(port: int) -> None:
    """Raises `UserError` if a port is taken: JAX would crash, or share it with another run."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"cannot listen at port {port} of --coordinator: {reason}; {_OTHER_PORT}") from error


def _probe(address: str) -> str:
    """Returns "coordinator", "program" for what does not speak its protocol, or "" where nobody answers."""
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS)
    except OSError:
        return ""
    frame = b""
    with connection, contextlib.suppress(OSError):
        connection.sendall(PREFACE)
        frame = connection.recv(9)
    return "coordinator" if len(frame) > 3 and frame[3] == SETTINGS else "program"
