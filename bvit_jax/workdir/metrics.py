"""Training metrics: averages over steps, metrics.jsonl and TensorBoard, the progress line."""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bvit_jax.errors import UserError

Number = int | float

UNSHOWN = ("images_per_second_per_chip", "memory_gb")

logger = logging.getLogger(__name__)


class MetricWindow:
    """Means of scalars over the steps since the last `reset`.

    `add` only keeps references, so that the device runs ahead; `mean` and `state` wait for it.
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

    Attributes:
      lines: of the file.

    Raises:
      UserError: the file cannot be written, here and in all methods.
    """

    def __init__(self, workdir: Path, active: bool) -> None:
        self.path = workdir / "metrics.jsonl"
        self.lines = 0
        self._active = active
        self._purge_step: int | None = None
        self._tensorboard: Any = None  # opened by the first write; False without tensorboardX
        if active:
            self._append("", mode="a")
            self.lines = self.path.read_bytes().count(b"\n")

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Appends ``{"step": ..., ...}``, names in order, floats exact, NaN and inf as null."""
        if not self._active:
            return
        values = {name: _json_number(metrics[name]) for name in sorted(metrics)}
        self._append(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        if board := self._board():
            for name in values:
                board.add_scalar(name, float(metrics[name]), step)

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
        if board := self._board():
            for kind, values in layers.items():
                for layer, value in values.items():
                    board.add_scalar(f"health/{kind}/{layer}", float(value), step)

    def add_images(self, step: int, name: str, grid: np.ndarray) -> None:
        """Writes a picture, uint8 (height, width, 3), to ``<name>.png``, over the one before.

        TensorBoard, where it is installed, keeps those of all steps.
        """
        if not self._active:
            return
        path = self.path.with_name(f"{name}.png")
        try:
            Image.fromarray(grid).save(path)
        except OSError as error:
            raise _user_error(path, error) from error
        if board := self._board():
            board.add_image(name, grid, step, dataformats="HWC")

    def truncate(self, lines: int, step: int) -> None:
        """Keeps the first lines only; call it when a run resumes.

        Args:
          lines: to keep, as `lines` was when the state was saved.
          step: of that state; TensorBoard hides what an earlier process wrote after it.
        """
        if not self._active:
            return
        temporary = self.path.with_suffix(".tmp")
        try:
            kept = self.path.read_bytes().splitlines(keepends=True)[:lines]
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, self.path)
        except OSError as error:
            raise _user_error(self.path, error) from error
        self.lines = len(kept)
        self._purge_step = step + 1

    def close(self) -> None:
        """Writes what TensorBoard still holds."""
        if self._tensorboard:
            try:
                self._tensorboard.close()
            except OSError as error:  # metrics.jsonl is the record; a run need not fail for this
                logger.warning("cannot write TensorBoard's file: %s", error.strerror)
                return  # its thread goes on, and needs what would be collected
        self._tensorboard = None

    def _append(self, text: str, mode: str = "r+") -> None:
        # Opened for each line: there are few, and nothing is left to flush or to close. A file that
        # is gone is not made anew: the run would go on apart from what it has written so far.
        try:
            with self.path.open(mode) as file:
                file.seek(0, os.SEEK_END)
                file.write(text)
        except OSError as error:
            raise _user_error(self.path, error) from error
        self.lines += text.count("\n")

    def _board(self) -> Any:
        """Returns TensorBoard's writer, opened by the first call, or False without tensorboardX."""
        if self._tensorboard is None:
            self._tensorboard = _summary_writer(self.path.parent / "tensorboard", self._purge_step)
        return self._tensorboard


def _user_error(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; make room or choose another workdir")


def _summary_writer(directory: Path, purge_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter  # here, because importing it takes a second
    except ImportError:
        return False
    return SummaryWriter(str(directory), purge_step=purge_step)


def _json_number(value: Number) -> Number | None:
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


class ProgressLine:
    """A live line with a bar on a terminal; where stderr is no terminal it does nothing.

    Args:
      total: steps of the run.
      step: steps already done.
    """

    def __init__(self, total: int, step: int = 0) -> None:
        self.active = sys.stderr.isatty()
        self._total = total
        if self.active:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=2,
            )
            description = format_line(step, total, {})
            self._task = self._progress.add_task(description, total=total, completed=step)
            self._progress.start()

    def update(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Shows the step and the latest means, see `format_line`; the bar adds the time left."""
        if self.active:
            shown = {name: value for name, value in metrics.items() if name != "seconds_left"}
            description = format_line(step, self._total, shown)
            self._progress.update(self._task, completed=step, description=description)

    def close(self) -> None:
        """Leaves the last line on the screen."""
        if self.active:
            self._progress.stop()


def format_line(step: int, total: int, metrics: Mapping[str, Number]) -> str:
    """Returns one line for the log: the step, then the metrics, known ones with their units.

    Known are ``epoch``, ``loss``, ``learning_rate``, ``images_per_second``, ``seconds_left`` and the
    totals of `bvit_jax.training.steps.health`, shown in that order; the others follow as given, without some
    that
    the files alone hold.
    """
    known = {
        "epoch": lambda x: f"epoch {x:.2f}",
        "loss": lambda x: f"loss {x:.4f}",
        "learning_rate": lambda x: f"learning rate {x:.3g}",
        "images_per_second": lambda x: f"{x:.1f} images/s" if x < 100 else f"{x:.0f} images/s",
        "seconds_left": lambda x: f"{_duration(x)} left",
        "flipped": lambda x: f"flipped {100 * x:.3g} %",
        "active_weights": lambda x: f"active weights {100 * x:.3g} %",
        "active_inputs": lambda x: f"active inputs {100 * x:.3g} %",
        "zeros": lambda x: f"zeros {100 * x:.3g} %",
        "dead_heads": lambda x: f"dead heads {x}",
    }
    parts = [f"step {step}/{total}"]
    parts += [show(metrics[name]) for name, show in known.items() if name in metrics]
    others = {name: value for name, value in metrics.items() if name not in known and name not in UNSHOWN}
    if not others.get("bad_images", 1):
        del others["bad_images"]
    parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in others.items()]
    return "  ".join(parts)


def _duration(seconds: Number) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
