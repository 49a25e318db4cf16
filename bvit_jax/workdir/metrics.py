"""Training metrics: averages over steps, metrics.jsonl and TensorBoard."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from PIL import Image

from bvit_jax import files
from bvit_jax.errors import UserError
from bvit_jax.workdir.tensorboard import Board

Number = int | float
STEPS_AHEAD = 2  # a step whose batch waits on the devices holds its memory

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What keeps the scalars and pictures of a run, in addition to its own files."""

    def add(self, step: int, scalars: Mapping[str, Number], pictures: Mapping[str, np.ndarray]) -> None:
        """Takes those of a step."""

    def close(self) -> None:
        """Takes nothing more."""


class MetricWindow:
    """Means of scalars over the steps since the last `reset`.

    `add` keeps references and waits for an earlier step, so that the host runs ahead, by few batches; `mean`
    and `state` wait for all.
    Values are summed step by step in float64, so the means do not depend on whether the window was
    saved and restored on the way.

    Attributes:
      not_finite: name and step of the first value seen, by `mean` or `state`, that is not finite.
    """

    def __init__(self) -> None:
        self.not_finite: tuple[str, int] | None = None
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._totals: dict[str, tuple[float, int]] = {}  # sum, number of values

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Adds the scalars of one step, on the device or not."""
        self._pending.append((step, dict(metrics)))
        if len(self._pending) > STEPS_AHEAD:
            jax.block_until_ready(self._pending[-1 - STEPS_AHEAD][1])

    def mean(self) -> dict[str, float]:
        """Returns the mean of every metric; empty without steps."""
        self._collect()
        return {name: total / count for name, (total, count) in self._totals.items()}

    def reset(self) -> None:
        """Forgets all steps."""
        self._pending, self._totals = [], {}

    def state(self) -> dict[str, list[float]]:
        """Returns the window as JSON values, exactly."""
        self._collect()
        return {name: [total, count] for name, (total, count) in self._totals.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replaces the window by one that `state` returned."""
        self._pending = []
        self._totals = {name: (total, count) for name, (total, count) in state.items()}

    def _collect(self) -> None:
        for step, metrics in jax.device_get(self._pending):
            for name, value in metrics.items():
                if self.not_finite is None and not math.isfinite(value):
                    self.not_finite = name, step
                total, count = self._totals.get(name, (0.0, 0))
                self._totals[name] = (total + float(value), count + 1)
        self._pending = []


class MetricWriter:
    """Appends metrics to ``metrics.jsonl``, and to TensorBoard where tensorboardX is installed.

    Args:
      workdir: an existing directory; TensorBoard files go to its ``tensorboard``.
      active: False makes every call do nothing, on all processes but the first.
      tracker: receives the same scalars and pictures, too.

    Attributes:
      lines: of the file.

    Raises:
      UserError: the file cannot be written, here and in all methods.
    """

    def __init__(self, workdir: Path, active: bool, tracker: Tracker | None = None) -> None:
        self.path = workdir / "metrics.jsonl"
        self.lines = 0
        self._active = active
        self._board, self._tracker = Board(workdir / "tensorboard"), tracker
        if active:
            with _reporting(self.path):
                files.append(self.path, "", make=True)
                self.lines = self.path.read_bytes().count(b"\n")

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Appends ``{"step": ..., ...}``, names in order, floats exact, NaN and inf as null."""
        if not self._active:
            return
        values = {name: _json_number(metrics[name]) for name in sorted(metrics)}
        self._append(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._track(step, metrics, {})

    def write_layers(self, step: int, layers: Mapping[str, Mapping[str, Number]]) -> None:
        """Appends ``{"step": ..., "health": {kind: {layer: value}}}``, values to four digits.

        In TensorBoard they are ``health/<kind>/<layer>``. Nothing is written without layers.
        """
        if not self._active or not layers:
            return
        rounded = {
            kind: {layer: _json_number(float(f"{value:.4g}")) for layer, value in values.items()}
            for kind, values in layers.items()
        }
        self._append(json.dumps({"step": step, "health": rounded}, allow_nan=False) + "\n")
        flat = {f"health/{kind}/{layer}": x for kind, values in layers.items() for layer, x in values.items()}
        self._track(step, flat, {})

    def add_images(self, step: int, name: str, grid: np.ndarray) -> None:
        """Writes a picture, uint8 (height, width, 3), to ``<name>.png``, over the one before.

        TensorBoard, where it is installed, keeps those of all steps.
        """
        if not self._active:
            return
        path = self.path.with_name(f"{name}.png")
        with _reporting(path), files.replacing(path) as temporary:
            Image.fromarray(grid).save(temporary)
        self._track(step, {}, {name: grid})

    def truncate(self, lines: int, step: int) -> None:
        """Keeps the first lines only; call it when a run resumes.

        Lines that are missing or cannot be read are logged; of a file with such lines a copy is kept.

        Args:
          lines: to keep, as `lines` was when the state was saved.
          step: of that state; TensorBoard hides what an earlier process wrote after it.
        """
        if not self._active:
            return
        with _reporting(self.path):
            content = self.path.read_bytes()
            found = content.split(b"\n")[:lines]  # the last may be half a line
            kept = [line for line in found if _is_line(line, step)]
            if len(kept) < lines:
                copy = self.path.with_name(f"{self.path.name}.damaged")
                unreadable = any(line and not _is_line(line, math.inf) for line in found)
                kept_in = f"; a copy of it is {copy.name}" if unreadable else ""
                logger.warning(
                    "%s has lost %d of %d lines of this run%s", self.path, lines - len(kept), lines, kept_in
                )
                if unreadable:
                    files.replace_file(copy, content)
            files.replace_file(self.path, b"".join(line + b"\n" for line in kept))
        self.lines = len(kept)
        self._board = Board(self.path.parent / "tensorboard", step + 1)

    def close(self) -> None:
        """Closes TensorBoard's file and the tracker."""
        self._board.close()
        if self._tracker is not None:
            self._tracker.close()

    def _track(self, step: int, scalars: Mapping[str, Number], pictures: Mapping[str, np.ndarray]) -> None:
        self._board.add(step, scalars, pictures)
        if self._tracker is not None:
            self._tracker.add(step, scalars, pictures)

    def _append(self, text: str) -> None:
        # Opened for each line: there are few, and nothing is left to flush or to close. A missing file is
        # not created again, since the run would then go on without the lines that it has written.
        with _reporting(self.path):  # on the disk before a checkpoint counts these lines
            files.append(self.path, text)
        self.lines += text.count("\n")


def _is_line(line: bytes, step: float) -> bool:
    """Returns whether a line holds metrics of a step up to this one."""
    try:
        values = json.loads(line)
        return 0 <= values["step"] <= step
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Raises `UserError` where the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room or choose another workdir"
        ) from error


def _json_number(value: Number) -> Number | None:
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None
