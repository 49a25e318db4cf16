"""From the host's batches to the devices, in a thread of its own, while the devices compute."""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bvit_jax.runtime import process
from bvit_jax.runtime.mesh import shard_batch

AHEAD = 2  # batches that wait on the devices
POLL_SECONDS = 0.5
CLOSE_SECONDS = 10
WARN_SECONDS = 60.0

logger = logging.getLogger(__name__)


class Feed:
    """An iterator of device batches that are fetched ahead; ``close`` it to stop its thread.

    Yields ``image`` and ``label`` sharded over the mesh, and the number of images in this process's
    part that took the place of undecodable ones. What the batches raise is raised by ``next``.

    Attributes:
      waited: seconds that ``next`` has waited for data so far.
    """

    def __init__(self, batches: Generator[Mapping[str, np.ndarray], None, None], mesh: Mesh) -> None:
        self.waited = 0.0
        self._batches, self._mesh = batches, mesh
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> tuple[dict[str, jax.Array], int]:
        item = self.next(lambda: False)
        assert item is not None
        return item

    def next(self, stop: Callable[[], bool]) -> tuple[dict[str, jax.Array], int] | None:
        """Returns the next batch, or None if ``stop`` returned True while there was none."""
        start, warn = time.perf_counter(), WARN_SECONDS
        while True:
            try:
                item = self._queue.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if stop():
                    return None
                if (waited := time.perf_counter() - start) > warn:
                    logger.warning(
                        "no images have come for %.0f seconds; does the data's disk answer?", waited
                    )
                    warn = math.inf
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the thread, and what loads the batches unless its files do not answer."""
        self._closed.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:  # it may be waiting for room
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        if not self._thread.is_alive():
            self._batches.close()

    def _run(self) -> None:
        try:
            for batch in process.leave_ctrl_c_to_us(self._batches):
                arrays = {name: array for name, array in batch.items() if name != "bad"}
                self._put((shard_batch(arrays, self._mesh), int(np.sum(batch["bad"] >= 0))))
                if self._closed.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:  # for the thread that asks
            self._put(error)

    def _put(self, item: Any) -> None:
        if not self._closed.is_set():
            self._queue.put(item)
