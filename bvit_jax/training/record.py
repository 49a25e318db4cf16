"""What a run carries from step to step in addition to its arrays, and when its events are due."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jax import Array
from ml_collections import ConfigDict

from bvit_jax.errors import UserError
from bvit_jax.training.evaluation import deciding_top1
from bvit_jax.workdir.checkpoint_files import FOLDER, complete_steps
from bvit_jax.workdir.metrics import MetricWindow

VERSION = 1  # of a record in a checkpoint; higher where an older reader would misread it


@dataclass
class Record:
    """The progress of a run; saved with its arrays as JSON.

    Attributes:
      window: metrics of the steps since the last line of the log.
      best: the best top-1 and its step, None before the first evaluation.
      figures: of the last evaluation.
      bad_images: images so far that could not be decoded.
      evaluated: whether the evaluation of the step, if it has one, is done.
      lines: of metrics.jsonl.
    """

    window: MetricWindow = field(default_factory=MetricWindow)
    best: dict[str, Any] = field(default_factory=lambda: {"top1": -1.0, "step": None})
    figures: dict[str, Any] = field(default_factory=dict)
    bad_images: int = 0
    evaluated: bool = True
    lines: int = 0

    def add(self, step: int, metrics: Mapping[str, Array], bad_images: int, *, evaluated: bool) -> None:
        """Takes the scalars of a step, and the number of its images that could not be decoded."""
        self.window.add(step, metrics)
        self.bad_images += bad_images
        self.evaluated = evaluated

    def evaluation(self, step: int, figures: dict[str, Any]) -> None:
        """Takes the figures of an evaluation."""
        self.figures, self.evaluated = {**figures, "step": step}, True
        if deciding_top1(figures) > self.best["top1"]:
            self.best = {"top1": deciding_top1(figures), "step": step}

    def means(self, workdir: Path) -> dict[str, float]:
        """Returns the means of the window.

        Raises:
          UserError: a value is not finite.
        """
        means = self.window.mean()
        if self.window.not_finite is not None:
            name, step = self.window.not_finite
            raise UserError(
                f"{name} is not finite at step {step}; {_kept(workdir)}: lower config.optim.learning_rate or"
                " set config.optim.clip_grad_norm; --debug_nans names the operation"
            )
        return means

    def result(self) -> dict[str, Any]:
        """Returns the figures of the last evaluation and the best top-1, with their steps."""
        return {**self.figures, "best_top1": self.best["top1"], "best_step": self.best["step"]}

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON values, exactly."""
        return {**vars(self), "version": VERSION, "window": self.window.state()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """Returns the record that `to_json` described, of this version or an earlier one.

        Raises:
          UserError: a later version wrote it.
        """
        if values.get("version", 1) > VERSION:
            raise UserError("the run was continued by a later version of this package, which must go on")
        window = MetricWindow()
        window.restore(values["window"])
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known} | {"window": window})


def _kept(workdir: Path) -> str:
    steps = complete_steps(workdir / FOLDER)
    return (
        f"the newest checkpoint in {workdir} is of step {steps[-1]}" if steps else "nothing was saved before"
    )


@dataclass(frozen=True)
class Timetable:
    """At which steps the events of a run are due; all of them at the last one.

    Attributes:
      total: steps of the run.
      log_every, save_every, eval_every: in steps.
    """

    total: int
    log_every: int
    save_every: int
    eval_every: int

    @classmethod
    def of(cls, config: ConfigDict, steps_per_epoch: int, total: int) -> "Timetable":
        """Returns the timetable of a configuration."""
        save_every = config.checkpoint.every_steps or steps_per_epoch
        return cls(total, config.log_every_steps, save_every, config.eval_every_epochs * steps_per_epoch)

    def logs(self, step: int) -> bool:
        """Returns whether metrics are written after a step."""
        return step % self.log_every == 0 or step == self.total

    def evaluates(self, step: int) -> bool:
        """Returns whether the state after a step is evaluated."""
        return step % self.eval_every == 0 or step == self.total

    def saves(self, step: int) -> bool:
        """Returns whether the state after a step is saved, as it is before every evaluation."""
        return step % self.save_every == 0 or self.evaluates(step)
