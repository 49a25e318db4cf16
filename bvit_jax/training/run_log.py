"""What a run reports: metrics.jsonl, TensorBoard, pictures, the log and the progress line."""

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bvit_jax.runtime import usage
from bvit_jax.runtime.chips import chip_of
from bvit_jax.runtime.compilation import lower
from bvit_jax.training import contact_sheet
from bvit_jax.training.clock import Clock
from bvit_jax.training.record import Record
from bvit_jax.training.setup import Run
from bvit_jax.training.steps import health
from bvit_jax.training.steps.preview import Seen
from bvit_jax.workdir.metrics import MetricWriter
from bvit_jax.workdir.progress import ProgressLine, format_line
from bvit_jax.workdir.weights_and_biases import Offline

logger = logging.getLogger(__name__)


class RunLog:
    """Writes the metrics of a run; all processes call it, and the first one writes.

    Args:
      workdir: of the run; it exists.
      config: of the run.
      run: built from it.
      record: of the run, whose window is summed up and whose number of lines is kept up to date.
      start: the step that the run starts or continues from; later lines of metrics.jsonl are removed.
    """

    def __init__(self, workdir: Path, config: ConfigDict, run: Run, record: Record, start: int) -> None:
        self._workdir, self._run, self._record = workdir, run, record
        self._log_every, self._batch_size = config.log_every_steps, config.batch_size
        self._is_main = jax.process_index() == 0
        project = config.wandb_project if self._is_main else ""
        tracker = Offline(workdir, project, json.loads(config.to_json_best_effort())) if project else None
        self._writer = MetricWriter(workdir, self._is_main, tracker)
        self._writer.truncate(record.lines, start)
        self._progress = ProgressLine(run.total_steps, start)
        chip = chip_of(run.mesh.devices.flat[0].device_kind)
        flops = usage.step_flops(lower(run.plain_step.function, *run.plain_step.arguments)) if chip else None
        peak = chip.bfloat16_flops if chip else None
        self._speed = partial(usage.speed, devices=run.mesh.size, flops=flops, peak=peak)
        self._clock = Clock(start, config.batch_size)

    def step(self, step: int, figures: health.Figures | None, waited: float) -> None:
        """Writes the means since the last call, which it waits for.

        Args:
          step: the last one.
          figures: of the network's health, None if it is not measured.
          waited: seconds that the run has waited for data so far.

        Raises:
          UserError: a metric is not finite, or a file cannot be written.
        """
        means = self._record.means(self._workdir)
        layers = {} if figures is None else health.per_layer(figures)
        lap = self._clock.lap(step, self._run.total_steps, waited)
        metrics = {
            **means,
            **health.totals(layers),
            **usage.device_memory(),
            "learning_rate": self._learning_rate(step),
            "epoch": step / self._run.steps_per_epoch,
            "bad_images": self._record.bad_images,
            **lap,
            **self._speed(self._batch_size, self._batch_size / lap["images_per_second"]),
        }
        self._writer.write(step, metrics)
        if health.layers_due(step, self._log_every, self._run.steps_per_epoch):
            self._writer.write_layers(step, layers)
        self._record.lines = self._writer.lines
        self._record.window.reset()
        self._progress.update(step, metrics)
        if self._is_main and not self._progress.active:
            logger.info(format_line(step, self._run.total_steps, metrics))

    def evaluation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Writes the figures of an evaluation."""
        self._writer.write(step, {f"eval_{name}": value for name, value in figures.items()})
        self._record.lines = self._writer.lines
        logger.info(
            "step %d/%d  top-1 %.2f %%  top-5 %.2f %%  loss %.4f  %d images",
            step,
            self._run.total_steps,
            100 * figures["top1"],
            100 * figures["top5"],
            figures["loss"],
            figures["images"],
        )

    def batch(self, step: int, seen: Seen, class_names: tuple[str, ...]) -> None:
        """Writes a picture of the images of a batch."""
        if self._is_main:
            self._writer.add_images(step, "batch", contact_sheet.draw(seen, class_names))

    def paused(self) -> AbstractContextManager[None]:
        """Returns a context whose duration does not count in the speed of training."""
        return self._clock.paused()

    def close(self) -> None:
        """Ends the progress line, and closes the files."""
        self._progress.close()
        self._writer.close()

    def _learning_rate(self, step: int) -> float:
        with jax.transfer_guard("allow"):  # optax computes it from numbers of the host
            return float(self._run.schedule(step - 1))
