"""The training loop, top to bottom."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax import data, models
from bvit_jax.errors import UserError
from bvit_jax.runtime import distributed, usage
from bvit_jax.runtime.chips import chip_of
from bvit_jax.runtime.compilation import compile_ahead, lower
from bvit_jax.runtime.feed import Feed
from bvit_jax.runtime.interruption import Interrupted, Interruption
from bvit_jax.runtime.mesh import local_rows, replicate, replicated
from bvit_jax.runtime.profiler import Profile
from bvit_jax.training import initial
from bvit_jax.training.clock import Clock
from bvit_jax.training.evaluation import build_eval_step, deciding_top1, eval_batches, evaluate_state
from bvit_jax.training.nans import named_nans
from bvit_jax.training.setup import Run, abstract_batch, build, check, open_splits
from bvit_jax.training.steps import health, preview
from bvit_jax.training.teacher import Teacher
from bvit_jax.workdir import runs
from bvit_jax.workdir.checkpoint import Checkpoints, is_saved
from bvit_jax.workdir.metrics import MetricWindow, MetricWriter, ProgressLine, format_line

logger = logging.getLogger(__name__)


@dataclass
class Record:
    """What a run carries from step to step beside its arrays; saved with them as JSON.

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

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON values, exactly."""
        return {**vars(self), "window": self.window.state()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """Returns the record that `to_json` described."""
        window = MetricWindow()
        window.restore(values["window"])
        return cls(**{**values, "window": window})


def train_and_evaluate(config: ConfigDict, workdir: Path, *, debug_nans: bool = False) -> dict[str, Any]:
    """Trains the model of ``config``, or continues the run that ``workdir`` holds.

    The workdir receives ``config.json``, ``metrics.jsonl``, checkpoints and, with tensorboardX,
    TensorBoard files. A run that was killed continues from its newest checkpoint, bit for bit as if
    it had not been. All processes of a run call this.

    Args:
      config: of the run.
      workdir: of the run, the same directory for all processes.
      debug_nans: stop at the first operation that makes a NaN, and name it; slower.

    Returns:
      The figures of the last evaluation and the best top-1, with their steps.

    Raises:
      UserError: a setting, a file or a directory is wrong, or the loss is no longer finite.
      Interrupted: SIGTERM came; the state is saved.
    """
    with ExitStack() as stack:
        # --- build -----------------------------------------------------------------------------
        interruption = Interruption()
        stack.callback(interruption.close)
        if debug_nans:
            stack.enter_context(named_nans())
        check(config)
        train_split = open_splits(config)
        run = build(config, train_split.num_examples, donate=not debug_nans)
        identity = {"teacher": run.teacher.digest, "dataset": train_split.version}
        size = str(train_split.num_examples)
        distributed.check_same({"configuration": config.to_json(), "number of images": size, **identity})
        # Before anything is made. A run that continues has no need of them: they may be gone.
        given = initial.NOTHING
        if config.init.path and not is_saved(workdir):
            given = initial.load(config, run.state.variables)
            distributed.check_same({"weights in config.init.path": given.digest})
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

        # --- start or resume -------------------------------------------------------------------
        _make_workdir(workdir)
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
        stack.callback(checkpoints.close)
        split_key = jax.jit(jax.random.split, out_shardings=replicated(run.mesh))
        key_init, key_train = split_key(jax.random.key(config.seed))
        restored = checkpoints.restore(run.state)
        if restored is None:
            state, record = run.create(key_init, replicate(given.variables, run.mesh)), Record()
        else:
            state, metadata = restored
            _check_identity(metadata["identity"], run.teacher, train_split, workdir)
            record = Record.from_json(metadata["record"])
            logger.info("continuing from step %d in %s", int(state.step), workdir)
        del given  # its memory
        start = int(state.step)
        if start > run.total_steps:
            raise UserError(
                f"the run in {workdir} is at step {start}, beyond the {run.total_steps} steps of this"
                " configuration; raise config.epochs or choose another workdir"
            )
        if is_main:
            _describe(workdir, config, train_split.class_names)
        writer = MetricWriter(workdir, active=is_main)
        stack.callback(writer.close)
        writer.truncate(record.lines, start)
        teacher_variables = replicate(run.teacher.variables, run.mesh)

        # --- compile ---------------------------------------------------------------------------
        progress = ProgressLine(run.total_steps, start)
        stack.callback(progress.close)
        feed = Feed(_train_batches(config, run, start), run.mesh)
        stack.callback(feed.close)
        shapes = abstract_batch(config.batch_size, config.model.image_size, run.mesh)
        arguments = run.state, shapes, teacher_variables, key_train
        train_step, health_step, take_first_batch = run.step, run.health, run.start
        model = runs.create_model(config, run.mesh, train=False)
        eval_step = build_eval_step(config, model, run.mesh)
        if start < run.total_steps and not debug_nans:
            if run.start is not None and start == 0:
                lowered = lower(run.start, run.state, shapes, key_train)
                take_first_batch = _compile("what the first batch sets", lowered, interruption, start)
            train_step = _compile("the step", lower(run.step, *arguments), interruption, start)
            if run.health is not None:
                lowered = lower(run.health, run.state, shapes, key_train)
                health_step = _compile("its health figures", lowered, interruption, start)
        chip = chip_of(run.mesh.devices.flat[0].device_kind)
        flops = usage.step_flops(lower(run.plain_step, *arguments)) if chip else None
        speed = partial(
            usage.speed, devices=run.mesh.size, flops=flops, peak=chip.bfloat16_flops if chip else None
        )
        checkpoint_every = config.checkpoint.every_steps or run.steps_per_epoch
        eval_every = config.eval_every_epochs * run.steps_per_epoch
        clock = Clock(start, config.batch_size)
        profile = Profile(workdir, config.profile_steps)
        stack.callback(profile.close)

        def save(step: int) -> None:
            if step == start and restored is None:
                return  # nothing has happened
            _finite(record.window, workdir)
            record.lines = writer.lines
            content = {"record": record.to_json(), "identity": identity}
            checkpoints.save(step, state, content, best_step=record.best["step"])

        # --- train -----------------------------------------------------------------------------
        for step in range(start, run.total_steps + 1):
            last = step == run.total_steps
            if step > start:
                try:
                    batch, bad = next(feed)
                except Exception:
                    if interruption.noticed:  # by the processes that load images too
                        save(step - 1)
                        raise Interrupted(step - 1) from None
                    raise
                record.bad_images += bad
                if step == start + 1:
                    seen = run.look(batch, start, key_train)
                    if is_main:
                        writer.add_images(step, "batch", preview.draw(seen, train_split.class_names))
                if step == 1 and take_first_batch is not None:
                    state = take_first_batch(state, batch, key_train)
                profile.before(step)
                state, metrics = train_step(state, batch, teacher_variables, key_train)
                profile.after(step, metrics)
                record.window.add(step, metrics)
                record.evaluated = not (step % eval_every == 0 or last)

                if step % config.log_every_steps == 0 or last:
                    layers = {}
                    if health_step is not None:
                        found, signs = health_step(state, batch, key_train)
                        state = state.replace(signs=signs)
                    means = _finite(record.window, workdir)
                    if health_step is not None:
                        layers = health.per_layer(found)
                    means |= health.totals(layers) | usage.device_memory()
                    means["learning_rate"] = float(run.schedule(step - 1))
                    means["epoch"] = step / run.steps_per_epoch
                    means["bad_images"] = record.bad_images
                    means |= clock.lap(step, run.total_steps, feed.waited)
                    means |= speed(config.batch_size, config.batch_size / means["images_per_second"])
                    writer.write(step, means)
                    if health.layers_due(step, config.log_every_steps, run.steps_per_epoch):
                        writer.write_layers(step, layers)
                    progress.update(step, means)
                    if is_main and not progress.active:
                        logger.info(format_line(step, run.total_steps, means))
                    record.window.reset()
                    checkpoints.check()

            best_so_far = record.best["step"]
            if not record.evaluated:
                with clock.paused():
                    batches = eval_batches(config, run.mesh)
                    try:
                        figures = evaluate_state(
                            eval_step, state, batches, run.mesh, run.gather, interruption.reached
                        )
                    except Exception as error:
                        if interruption.noticed or isinstance(error, Interrupted):
                            save(step)
                            raise Interrupted(step) from None
                        raise
                _record_evaluation(record, figures, step, run.total_steps, writer)

            with clock.paused():
                due = step > start and (step % checkpoint_every == 0 or last)
                if due or record.best["step"] != best_so_far:
                    save(step)
                if interruption.reached() and not last:
                    save(step)
                    raise Interrupted(step)
    best = record.best
    return {**record.figures, "best_top1": best["top1"], "best_step": best["step"]}


def _compile(name: str, lowered: Any, interruption: Interruption, step: int) -> Any:
    compiled = compile_ahead(name, lowered, lambda: interruption.noticed)
    if compiled is None:
        raise Interrupted(step)
    return compiled


def _train_batches(config: ConfigDict, run: Run, start: int) -> Any:
    rows = local_rows(run.mesh, config.batch_size)
    size = config.model.image_size
    return data.train_batches(config.data, size, config.batch_size, config.seed, start, rows.tolist())


def _record_evaluation(
    record: Record, figures: dict[str, Any], step: int, total: int, writer: MetricWriter
) -> None:
    writer.write(step, {f"eval_{name}": value for name, value in figures.items()})
    logger.info(
        "step %d/%d  top-1 %.2f %%  top-5 %.2f %%  loss %.4f  %d images",
        step,
        total,
        100 * figures["top1"],
        100 * figures["top5"],
        figures["loss"],
        figures["images"],
    )
    record.figures, record.evaluated = {**figures, "step": step}, True
    if deciding_top1(figures) > record.best["top1"]:
        record.best = {"top1": deciding_top1(figures), "step": step}


def _finite(window: MetricWindow, workdir: Path) -> dict[str, float]:
    means = window.mean()
    if window.not_finite is not None:
        name, step = window.not_finite
        raise UserError(
            f"{name} is not finite at step {step}; the last checkpoint before is kept in {workdir}: lower"
            " config.optim.learning_rate or set config.optim.clip_grad_norm; --debug_nans names the operation"
        )
    return means


def _check_identity(identity: dict[str, str], teacher: Teacher, split: data.Split, workdir: Path) -> None:
    if identity["teacher"] != teacher.digest:
        raise UserError(
            f"the run in {workdir} was started with another teacher than config.teacher.path;"
            " use that one or choose another workdir"
        )
    version = identity["dataset"]
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
