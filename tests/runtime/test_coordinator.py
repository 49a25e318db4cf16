"""What can be wrong with the coordinator of a run: its port, its number, its end."""

import itertools
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from bvit_jax.errors import UserError
from bvit_jax.runtime import coordinator

OURS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # the settings of an HTTP/2 server


@pytest.fixture(autouse=True)
def release() -> Iterator[None]:
    yield
    while coordinator._claims:
        coordinator._claims.pop().close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_port_that_is_taken(listener: socket.socket) -> None:
    with pytest.raises(
        UserError, match=r"cannot listen at port [0-9]+ of --coordinator: Address already in u"
    ):
        coordinator.claim(address_of(listener), 0)
    coordinator.claim(address_of(listener), 1)  # is not the one that listens


def test_a_number_that_is_given_twice() -> None:
    coordinator.claim("host:1", 3)
    with pytest.raises(UserError, match="--process_id=3 and --coordinator=host:1 is running on this machine"):
        coordinator.claim("host:1", 3)


@pytest.mark.parametrize(
    ("said", "answer"),
    [(OURS, "coordinator"), (b"HTTP/1.1 400 Bad Request\r\n", "program"), (b"", "program")],
)
def test_what_answers(
    said: bytes, answer: str, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "PROBE_SECONDS", 0.2)

    def serve() -> None:
        connection, _ = listener.accept()
        connection.sendall(said)
        connection.recv(1000)
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert coordinator._probe(address_of(listener)) == answer
    thread.join()


def test_nobody_answers(listener: socket.socket) -> None:
    address = address_of(listener)
    listener.close()
    assert coordinator._probe(address) == ""


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["program"], "another program than process 0 answers at --coordinator=a:1"),
        (["", "coordinator", ""], "process 0 at --coordinator=a:1 has ended"),
        ([""], "late"),
        (["", "coordinator"], "late"),
    ],
)
def test_what_becomes_of_it(answers: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = itertools.chain(answers, itertools.repeat(answers[-1]))
    monkeypatch.setattr(coordinator, "GONE_SECONDS", 0.05)
    monkeypatch.setattr(coordinator, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(coordinator, "_probe", lambda address: next(sequence))
    assert coordinator.watch("a:1", 0.3, "late", threading.Event()).startswith(message)


def test_nothing_is_wrong_once_all_have_come() -> None:
    done = threading.Event()
    done.set()
    assert coordinator.watch("a:1", 10, "late", done) == ""


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "E 1 unexpectedly tried to connect with a different incarnation",
            "two processes have --process_id=1",
        ),
        ("F client.h:80 the JAX distributed service detected fatal errors", "other processes of the run"),
        ("free(): invalid pointer", "$"),
    ],
)
def test_why_jax_aborts(said: str, message: str) -> None:
    assert re.match(message, coordinator.explain(0, 4, said))


@pytest.mark.parametrize(
    ("said", "index", "count", "who"),
    [
        ("Connection closed by peer", 1, 2, "process 0 of the run does not answer"),
        (
            "stopped sending heartbeats: /job:jax_worker/replica:0/task:2",
            0,
            4,
            "process 2 of the run does not",
        ),
        (
            "/replica:0/task:3 told /replica:0/task:1, /replica:0/task:2",
            1,
            4,
            "processes 2, 3 of the run do not",
        ),
        ("Connection closed by peer", 1, 4, "other processes of the run do not answer"),
        ("Connection closed by peer", None, None, "other processes of the run do not answer"),
    ],
)
def test_who_is_gone(said: str, index: int | None, count: int | None, who: str) -> None:
    assert coordinator.silent(said, index, count).startswith(who)
