"""The training loop, top to bottom."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax import data, models, optim, pretrained, runs
from bvit_jax.augmentation import Augmentation
from bvit_jax.checkpoint import Checkpoints
from bvit_jax.erasing import Erasing
from bvit_jax.errors import UserError
from bvit_jax.evaluation import build_eval_step, eval_batches, evaluate
from bvit_jax.feed import Feed
from bvit_jax.metrics import MetricWindow, MetricWriter, ProgressLine, format_line
from bvit_jax.mixing import Mixing
from bvit_jax.normalization import Normalization
from bvit_jax.sharding import check_batch_size, make_mesh, replicated
from bvit_jax.step import jit_train_step, make_train_step
from bvit_jax.train_state import TrainState, abstract_state, create_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """The distillation teacher: an argument of the step, neither trained nor checkpointed.

    Attributes:
      model: None where there is no teacher.
      variables: empty where there is none.
      digest: SHA-256 of the weights; a run resumes only with the same teacher.
      normalize: what its images go through, which need not be what the student's do.
    """

    model: nn.Module | None
    variables: dict[str, Any]
    digest: str
    normalize: Normalization | None


def load_teacher(config: ConfigDict) -> Teacher:
    """Loads the teacher that ``config.teacher`` names.

    Raises:
      UserError: distillation is asked for without a teacher or the other way round; it cannot be read,
        or has other classes or another image size than the student.
    """
    distills, path = config.loss.distillation_weight > 0, config.teacher.path
    if distills and not path:
        raise UserError(
            "config.teacher.path is empty; name the teacher's directory, or train on the labels with"
            " config.loss.distillation_weight=0"
        )
    if path and not distills:
        raise UserError(
            "config.loss.distillation_weight is 0, so that the teacher would do nothing; raise it or"
            " leave config.teacher.path empty"
        )
    check_heads(config)
    if not path:
        return Teacher(None, {}, "", None)
    origin = Path(config.teacher.path).expanduser()
    try:
        teacher = pretrained.load(origin)
    except UserError as error:
        raise UserError(f"config.teacher.path: {error}") from error
    for key in ("num_classes", "image_size"):
        if teacher.config[key] != config.model[key]:
            raise UserError(
                f"the teacher in {origin} has {key} {teacher.config[key]} and the student"
                f" {config.model[key]}; use another config.teacher.path or config.model.{key}"
            )
    p = teacher.preprocessing
    model = models.create_model(teacher.config, jnp.dtype(config.compute_dtype))
    return Teacher(model, teacher.arrays(), teacher.digest(), Normalization(p.mean, p.std))


def check_heads(config: ConfigDict) -> None:
    """Raises `UserError` if the model has a head for a teacher and one for labels, and trains only one."""
    if config.model.get("distillation_head") and not 0 < config.loss.distillation_weight < 1:
        raise UserError(
            "config.model.distillation_head needs a teacher for one head and labels for the other; set"
            " config.loss.distillation_weight between 0 and 1, such as 0.5"
        )


@dataclass(frozen=True)
class Run:
    """What is built from a configuration before the first step.

    Attributes:
      mesh: all devices.
      model: the student.
      teacher: see `Teacher`.
      schedule: learning rate of each step.
      state: shapes and shardings of the state.
      create: makes the initial state of a key, on the devices.
      step: the training step, to be compiled by its first call or ahead of time.
      steps_per_epoch, total_steps: lengths in steps.
    """

    mesh: Mesh
    model: nn.Module
    teacher: Teacher
    schedule: Any
    state: TrainState
    create: Any
    step: Any
    steps_per_epoch: int
    total_steps: int


def build(
    config: ConfigDict,
    num_examples: int,
    devices: Sequence[jax.Device] | None = None,
    teacher: Teacher | None = None,
) -> Run:
    """Builds everything that training needs but the data, and checks that it fits together.

    Args:
      config: the settings.
      num_examples: images of an epoch.
      devices: by default all of all processes.
      teacher: in place of the one that ``config.teacher`` names.
    """
    mesh = make_mesh(devices)
    check_batch_size("batch_size", config.batch_size, mesh)
    check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
    image_size = config.model.image_size
    model = models.create_model(config.model, jnp.dtype(config.compute_dtype))
    teacher = load_teacher(config) if teacher is None else teacher
    steps_per_epoch = data.steps_per_epoch(num_examples, config.batch_size)
    schedule = optim.make_schedule(
        config.optim,
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
    )
    optimizer = optim.make_optimizer(config.optim, schedule)
    step = make_train_step(
        model,
        optimizer,
        Normalization(config.data.mean, config.data.std),
        teacher=teacher.model,
        teacher_normalize=teacher.normalize,
        teacher_targets=config.loss.teacher_targets,
        distillation_weight=config.loss.distillation_weight,
        label_smoothing=config.loss.label_smoothing,
        augmentation=Augmentation(Erasing(**config.erase), Mixing(**config.mix)),
    )
    return Run(
        mesh=mesh,
        model=model,
        teacher=teacher,
        schedule=schedule,
        state=abstract_state(model, optimizer, image_size, replicated(mesh)),
        create=jax.jit(
            lambda key: create_state(key, model, optimizer, image_size),
            out_shardings=replicated(mesh),
        ),
        step=jit_train_step(step, mesh),
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
    )


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains the model of ``config``, or continues the run that ``workdir`` holds.

    The workdir receives ``config.json``, ``metrics.jsonl``, checkpoints and, with tensorboardX,
    TensorBoard files. A run that was killed continues from its newest checkpoint, bit for bit as if
    it had not been.

    Returns:
      The figures of the last evaluation and the best top-1, with their steps.

    Raises:
      UserError: a setting, a file or a directory is wrong, or the loss is no longer finite.
    """
    # --- build ---------------------------------------------------------------------------------
    config_lib.validate(config)
    train_split = open_splits(config)
    run = build(config, train_split.num_examples)
    is_main = jax.process_index() == 0
    logger.info(
        "%s with %.2f M parameters on %d × %s, %d steps of %d images",
        config.model.name,
        models.num_params(run.state.params) / 1e6,
        run.mesh.size,
        run.mesh.devices.flat[0].device_kind,
        run.total_steps,
        config.batch_size,
    )

    # --- start or resume -----------------------------------------------------------------------
    _make_workdir(workdir)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    key_init, key_train = jax.random.split(jax.random.key(config.seed))
    restored = checkpoints.restore("latest", run.state)
    window, best, figures, bad_images = MetricWindow(), {"top1": -1.0, "step": 0}, {}, 0
    if restored is None:
        state = run.create(key_init)
    else:
        state, metadata = restored
        _check_teacher(metadata["teacher"], run.teacher, workdir)
        _check_dataset(metadata["dataset"], train_split, workdir)
        window.restore(metadata["window"])
        best, figures, bad_images = metadata["best"], metadata["figures"], metadata["bad_images"]
        logger.info("continuing from step %d in %s", int(state.step), workdir)
    start = int(state.step)
    if start > run.total_steps:
        raise UserError(
            f"the run in {workdir} is at step {start}, beyond the {run.total_steps} steps of this"
            " configuration; raise config.epochs or choose another workdir"
        )
    if is_main:
        _describe(workdir, config, train_split.class_names)
    writer = MetricWriter(workdir, active=is_main)
    writer.truncate_after(start)
    teacher_variables = jax.device_put(run.teacher.variables, replicated(run.mesh))

    # --- train ---------------------------------------------------------------------------------
    eval_step = build_eval_step(config, run.model, run.mesh)
    batches = data.train_batches(
        config.data,
        config.model.image_size,
        config.batch_size,
        config.seed,
        start,
        jax.process_index(),
        jax.process_count(),
    )
    feed = Feed(batches, run.mesh)
    progress = ProgressLine(run.total_steps, start)
    checkpoint_every = config.checkpoint.every_steps or run.steps_per_epoch
    eval_every = config.eval_every_epochs * run.steps_per_epoch
    clock = _Clock(start, config.batch_size)
    try:
        for step in range(start + 1, run.total_steps + 1):
            batch, bad = next(feed)
            bad_images += bad
            state, metrics = run.step(state, batch, teacher_variables, key_train)
            window.add(metrics)
            last = step == run.total_steps

            if step % config.log_every_steps == 0 or last:
                means = _finite(window.mean(), step, workdir)
                means["learning_rate"] = float(run.schedule(step - 1))
                means["epoch"] = step / run.steps_per_epoch
                means["bad_images"] = bad_images
                means |= clock.lap(step, run.total_steps, feed.waited)
                writer.write(step, means)
                progress.update(step, means)
                if is_main and not progress.active:
                    logger.info(format_line(step, run.total_steps, means))
                window.reset()

            if step % eval_every == 0 or last:
                with clock.paused():
                    figures = evaluate(eval_step, state.variables, eval_batches(config), run.mesh)
                    figures["step"] = step
                    writer.write(step, {f"eval_{k}": v for k, v in figures.items() if k != "step"})
                    logger.info(
                        "step %d/%d  top-1 %.2f %%  top-5 %.2f %%  loss %.4f  %d images",
                        step,
                        run.total_steps,
                        100 * figures["top1"],
                        100 * figures["top5"],
                        figures["loss"],
                        figures["images"],
                    )
                    if figures["top1"] > best["top1"]:
                        best = {"top1": figures["top1"], "step": step}
                        checkpoints.save_best(step, state, {"figures": figures})

            if step % checkpoint_every == 0 or last:
                with clock.paused():
                    _finite(window.mean(), step, workdir)
                    checkpoints.save_latest(
                        step,
                        state,
                        {
                            "window": window.state(),
                            "best": best,
                            "figures": figures,
                            "teacher": run.teacher.digest,
                            "dataset": train_split.version,
                            "bad_images": bad_images,
                        },
                    )
    finally:
        feed.close()
        progress.close()
        writer.close()
        checkpoints.close()
    return {**figures, "best_top1": best["top1"], "best_step": best["step"]}


class _Clock:
    """Speed and time left, without the time spent in evaluation and saving."""

    def __init__(self, step: int, batch_size: int) -> None:
        self._batch_size = batch_size
        self._step, self._start, self._waited = step, time.perf_counter(), 0.0

    def lap(self, step: int, total: int, waited: float) -> dict[str, float]:
        """Returns what happened since the last lap.

        Args:
          step: the last one done.
          total: number of steps.
          waited: seconds spent waiting for data since the start.

        Returns:
          Images a second, the seconds left at that speed, and the share of the time that went into
          waiting for data.
        """
        now = time.perf_counter()
        seconds = now - self._start
        seconds_per_step = seconds / (step - self._step)
        share = (waited - self._waited) / seconds
        self._step, self._start, self._waited = step, now, waited
        return {
            "images_per_second": self._batch_size / seconds_per_step,
            "seconds_left": (total - step) * seconds_per_step,
            "data_wait": share,
        }

    def paused(self) -> "_Pause":
        """Returns a context whose duration does not count."""
        return _Pause(self)

    def skip(self, seconds: float) -> None:
        """Takes a duration out of the current lap."""
        self._start += seconds


class _Pause:
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._clock.skip(time.perf_counter() - self._start)


def _finite(means: dict[str, float], step: int, workdir: Path) -> dict[str, float]:
    loss = means.get("loss", 0.0)
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step} or shortly before; the last good checkpoint is kept"
            f" in {workdir}: lower config.optim.learning_rate or set config.optim.clip_grad_norm"
        )
    return means


def open_splits(config: ConfigDict) -> data.Split:
    """Checks both splits and returns the one to train on."""
    train = data.open_train_split(config.data)
    for split in (train, data.open_eval_split(config.data)):
        if split.num_classes != config.model.num_classes:
            raise UserError(
                f"config.model.num_classes is {config.model.num_classes}; the dataset"
                f" {config.data.dataset} has {split.num_classes} classes"
            )
    return train


def _check_teacher(digest: str, teacher: Teacher, workdir: Path) -> None:
    if digest != teacher.digest:
        raise UserError(
            f"the run in {workdir} was started with another teacher than config.teacher.path;"
            " use that one or choose another workdir"
        )


def _check_dataset(version: str, split: data.Split, workdir: Path) -> None:
    if version != split.version:
        raise UserError(
            f"the run in {workdir} was started with version {version} of {split.dataset}, and there is"
            f" {split.version} now, whose order may be another; name it in config.data.dataset, as in"
            f" {split.dataset}:{version}"
        )


def _make_workdir(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the workdir {workdir}: {error.strerror}; choose another --workdir"
        ) from error


def _describe(workdir: Path, config: ConfigDict, class_names: Sequence[str]) -> None:
    try:
        config_lib.save(config, workdir / "config.json")
        runs.write_class_names(workdir, class_names)
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}; choose another --workdir") from error
