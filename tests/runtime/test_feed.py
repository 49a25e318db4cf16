"""Batches fetched ahead: order, waiting, errors, and threads that end."""

import threading
import time

import jax
import numpy as np
import pytest

from bvit_jax.errors import UserError
from bvit_jax.runtime import feed as feed_module
from bvit_jax.runtime.feed import AHEAD, Feed
from bvit_jax.runtime.mesh import batch_sharded, make_mesh


def batches(made, count, seconds=0.0, error=None):
    """Yields numbered batches of eight, counting them in ``made``; then raises ``error``, if any."""
    for i in range(count):
        time.sleep(seconds)
        made.append(i)
        bad = np.where(np.arange(8) < i % 3, i, -1).astype(np.int32)
        yield {"image": np.full((8, 2, 2, 3), i, np.uint8), "label": np.arange(8, dtype=np.int32), "bad": bad}
    if error is not None:
        raise error


@pytest.fixture
def mesh():
    return make_mesh()


def test_batches_arrive_in_order_and_sharded(mesh):
    feed = Feed(batches([], 5), mesh)
    for i, (batch, bad) in enumerate(feed):
        assert batch.keys() == {"image", "label"}
        assert batch["image"].sharding == batch_sharded(mesh)
        assert (np.asarray(batch["image"]) == i).all()
        assert bad == i % 3
    feed.close()
    assert i == 4


def test_some_batches_are_fetched_ahead_and_no_more(mesh):
    made = []
    feed = Feed(batches(made, 100), mesh)
    deadline = time.monotonic() + 10
    while len(made) < AHEAD + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == AHEAD + 1  # the last one waits for room
    feed.close()


def test_waiting_is_counted(mesh):
    feed = Feed(batches([], 3, seconds=0.2), mesh)
    next(feed)
    assert 0.1 < feed.waited < 2
    time.sleep(0.6)  # the next ones are there
    before = feed.waited
    next(feed)
    assert feed.waited - before < 0.1
    feed.close()


@pytest.mark.parametrize("error", [UserError("damaged"), KeyError("bug")])
def test_errors_reach_whoever_asks(mesh, error):
    feed = Feed(batches([], 2, error=error), mesh)
    next(feed)
    next(feed)
    with pytest.raises(type(error)) as caught:
        next(feed)
    assert caught.value is error
    feed.close()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_ends_the_thread_and_the_batches(mesh, taken):
    source = batches([], 100)
    feed = Feed(source, mesh)
    for _ in range(taken):
        next(feed)
    feed.close()
    assert not any(thread.name == "feed" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(source)


def test_batches_stay_on_the_device(mesh):
    feed = Feed(batches([], 1), mesh)
    batch, _ = next(feed)
    assert all(isinstance(array, jax.Array) for array in batch.values())
    feed.close()


def test_a_disk_that_hangs_is_said_once(mesh, monkeypatch, caplog):
    for name in ("POLL_SECONDS", "WARN_SECONDS"):
        monkeypatch.setattr(feed_module, name, 0.02)
    release, asked = threading.Event(), []

    def hanging():
        release.wait(30)
        yield from batches([], 1)

    feed = Feed(hanging(), mesh)
    assert feed.next(lambda: len(asked) == 4 or asked.append(0)) is None
    assert caplog.text.count("no images have come for") == 1
    release.set()
    feed.close()
