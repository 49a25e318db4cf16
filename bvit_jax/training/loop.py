"""The training loop, top to bottom."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bvit_jax import data, models
from bvit_jax.data.cores import usable_cores
from bvit_jax.errors import UserError
from bvit_jax.models.choice import platform
from bvit_jax.runtime import distributed
from bvit_jax.runtime.compilation import compile_all, lower
from bvit_jax.runtime.feed import Feed
from bvit_jax.runtime.interruption import Interrupted, Interruption
from bvit_jax.runtime.mesh import local_rows, replicate, replicated, with_sharding
from bvit_jax.runtime.profiler import Profile
from bvit_jax.training import initial
from bvit_jax.training.evaluation import eval_batches, evaluate_state
from bvit_jax.training.nans import named_nans
from bvit_jax.training.record import Record, Timetable
from bvit_jax.training.run_log import RunLog
from bvit_jax.training.setup import Run, build, check, open_splits
from bvit_jax.training.steps import health
from bvit_jax.training.steps.batch import Batch
from bvit_jax.training.steps.programs import Program, Programs
from bvit_jax.training.steps.state import TrainState
from bvit_jax.workdir import starts
from bvit_jax.workdir.checkpoint import Checkpoints, is_saved
from bvit_jax.workdir.collectives import on_first_process
from bvit_jax.workdir.lock import Lock

logger = logging.getLogger(__name__)


def train_and_evaluate(
    config: ConfigDict,
    workdir: Path,
    *,
    debug_nans: bool = False,
    allow_changes: bool = False,
    run: Run | None = None,
    interruption: Interruption | None = None,
) -> dict[str, Any]:
    """Trains the model of ``config``, or continues the run that ``workdir`` holds.

    The workdir receives what docs/training.md lists. A run that was killed continues from its newest
    checkpoint, bit for bit as if it had not been. All processes of a run call this.

    Args:
      config: of the run.
      workdir: of the run, the same directory for all processes.
      debug_nans: stop at the first operation that makes a NaN, and name it; slower.
      allow_changes: continue also with settings by which model or steps mean something else.
      run: what `build` made of the same configuration, to use what is compiled again; by default it is built.
      interruption: says when to stop; by default signals stay the caller's. ``Interruption(sigterm=True)``
        saves and stops at SIGTERM, as the command does.

    Returns:
      The figures of the last evaluation and the best top-1, with their steps.

    Raises:
      UserError: a setting, a file or a directory is wrong, or the loss is no longer finite.
      Interrupted: ``interruption`` said so; the state is saved.
    """
    with ExitStack() as stack:
        # --- build -----------------------------------------------------------------------------
        interruption = stack.enter_context(closing(interruption or Interruption()))
        if debug_nans:
            stack.enter_context(named_nans())
        check(config)
        on_first_process(lambda: starts.check(workdir, config, allow_changes=allow_changes))
        split = open_splits(config)
        run = build(config, split.num_examples, donate=not debug_nans) if run is None else run
        identity = _identity(run, split)
        given = _given(config, run, workdir, identity, split.num_examples)
        due = Timetable.of(config, run.steps_per_epoch, run.total_steps)
        _announce(config, run)

        # --- start or resume -------------------------------------------------------------------
        interruption.begin()
        lock = stack.enter_context(closing(Lock(workdir)))
        checkpoints = stack.enter_context(closing(Checkpoints(workdir, keep=config.checkpoint.keep)))
        key_init, key = run.programs.keys.run(jax.random.key(config.seed))
        restored = checkpoints.restore(run.state)
        record, start = _resumed(restored, run, split, identity, workdir)
        starts.write(workdir, config, split.class_names, start)
        log = stack.enter_context(closing(RunLog(workdir, config, run, record, start)))
        teacher = replicate(run.teacher.variables, run.mesh)

        # --- compile ---------------------------------------------------------------------------
        feed = stack.enter_context(closing(Feed(_train_batches(config, run, start), run.mesh)))
        programs = run.programs
        with log.paused():
            if not debug_nans:
                # Compilers for GPUs measure kernels on the device, which others must not disturb.
                threads = usable_cores() if platform(run.mesh) == "cpu" else 1
                _compile(_needed(run, start, record, given), interruption, start, threads)
            state = restored[0] if restored else programs.create.run(key_init, given)
        del given, restored  # their memory
        profile = stack.enter_context(closing(Profile(workdir, config.profile_steps)))
        save = partial(_save, checkpoints, record, identity, workdir, log, lock)
        evaluate = partial(_evaluate, config, run, record, log, interruption)

        # --- train -----------------------------------------------------------------------------
        # Arrays move by device_put and device_get alone. To name a NaN, jax runs single operations.
        stack.enter_context(jax.transfer_guard("allow" if debug_nans else "disallow"))
        if not record.evaluated:
            evaluate(start, state)
            save(start, state)
        for step in range(start + 1, run.total_steps + 1):
            batch, bad = _next(feed, interruption, step - 1, partial(save, step - 1, state))
            if step == start + 1:
                log.batch(step, programs.preview.run(batch, state.step, key), split.class_names)
            if step == 1 and programs.first_batch is not None:
                state = programs.first_batch.run(state, batch, key)
            profile.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = programs.train.run(state, batch, teacher, key)
            profile.after(step, metrics)
            record.add(step, metrics, bad, evaluated=not due.evaluates(step))
            if due.logs(step):
                lock.check()
                state, figures = _measured(programs, state, batch, key)
                log.step(step, figures, feed.waited)
                checkpoints.check()
            if due.saves(step):
                save(step, state)
            if due.evaluates(step):
                evaluate(step, state)
                save(step, state)  # the record alone: the arrays are saved
            if interruption.reached() and step < run.total_steps:
                save(step, state)
                raise interruption.at(step)
    return record.result()


def _given(config: ConfigDict, run: Run, workdir: Path, identity: dict[str, str], images: int) -> Any:
    """Returns the arrays that a new run starts from, on all devices, once all processes agree on the run."""
    distributed.check_same({"configuration": config.to_json(), "number of images": str(images), **identity})
    # Before any file is written. A run that continues does not need them: they may be gone.
    if not config.init.path or is_saved(workdir):
        return {}
    given = initial.load(config, run.state.variables)
    distributed.check_same({"weights in config.init.path": given.digest})
    return replicate(given.variables, run.mesh)


def _announce(config: ConfigDict, run: Run) -> None:
    logger.info(
        "%s with %.2f M parameters on %d × %s, %d steps of %d images",
        config.model.name,
        models.num_params(run.state.params) / 1e6,
        run.mesh.size,
        run.mesh.devices.flat[0].device_kind,
        run.total_steps,
        config.batch_size,
    )
    training, evaluation = (models.choose(config, run.mesh, train=train) for train in (True, False))
    logger.info("training executes with %s; evaluation with %s", training, evaluation)


def _resumed(
    restored: tuple[TrainState, dict[str, Any]] | None,
    run: Run,
    split: data.Split,
    identity: dict[str, str],
    workdir: Path,
) -> tuple[Record, int]:
    """Returns the record of a run and the step that it continues from."""
    if restored is None:
        return Record(), 0
    state, metadata = restored
    _check_identity(metadata["identity"], identity, split, workdir)
    start = int(state.step)
    logger.info("continuing from step %d in %s", start, workdir)
    if start > run.total_steps:
        raise UserError(
            f"the run in {workdir} is at step {start}, beyond the {run.total_steps} steps of this"
            " configuration; raise config.epochs or choose another workdir"
        )
    return Record.from_json(metadata["record"]), start


def _needed(run: Run, start: int, record: Record, given: Any) -> list[Program]:
    """Returns the programs that a run still calls, those that take longest to compile first."""
    programs = run.programs
    trains = start < run.total_steps
    programs.create.arguments = (programs.create.arguments[0], with_sharding(given, replicated(run.mesh)))
    steps = [programs.train, programs.health] if trains else []
    first = [programs.create, programs.first_batch] if start == 0 else []
    last = [programs.evaluate, programs.gather] if trains or not record.evaluated else []
    shown = [programs.preview] if trains else []
    return [program for program in (*steps, *first, *last, *shown) if program is not None]


def _compile(programs: Sequence[Program], interruption: Interruption, step: int, threads: int) -> None:
    """Compiles those of the programs that are not compiled yet, ``threads`` of them at the same time.

    Raises:
      Interrupted: ``interruption`` said so; ``step`` is what the run has reached.
    """
    missing = [program for program in programs if not program.compiled]
    lowered = ((program.name, _lowered(program)) for program in missing)
    compiled = compile_all(lowered, lambda: interruption.noticed, threads=threads)
    if compiled is None:
        raise interruption.at(step)
    for program, run in zip(missing, compiled, strict=True):
        program.run = run


def _lowered(program: Program) -> Any:
    logger.info("tracing %s", program.name)
    return lower(program.function, *program.arguments)


def _train_batches(config: ConfigDict, run: Run, start: int) -> Generator[data.Batch, None, None]:
    rows = local_rows(run.mesh, config.batch_size)
    size = config.model.image_size
    return data.train_batches(config.data, size, config.batch_size, config.seed, start, rows.tolist())


def _next(
    feed: Feed, interruption: Interruption, step: int, save: Callable[[], None]
) -> tuple[dict[str, jax.Array], int]:
    """Returns the next batch; where none comes, the state after ``step`` is saved first.

    Raises:
      Interrupted: a signal came meanwhile, or has ended what loads images, too.
    """
    try:
        fed = feed.next(lambda: interruption.noticed)
    except Exception:
        if not interruption.noticed:
            if jax.process_count() == 1:  # several save only what all of them have reached
                save()
            raise
        fed = None
    if fed is None:
        save()
        raise interruption.at(step)
    return fed


def _measured(
    programs: Programs, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[TrainState, health.Figures | None]:
    """Returns the health of the network, if it is measured, and the state that counts flips from here on."""
    if programs.health is None:
        return state, None
    figures, signs = programs.health.run(state, batch, key)
    return state.replace(signs=signs), figures


def _save(
    checkpoints: Checkpoints,
    record: Record,
    identity: dict[str, str],
    workdir: Path,
    log: RunLog,
    lock: Lock,
    step: int,
    state: TrainState,
) -> None:
    """Saves the state after a step; if it is saved already, the record alone, if that has changed."""
    if step == 0:
        return  # nothing has happened
    lock.check()
    record.means(workdir)  # never a state that is not finite
    content = {"record": record.to_json(), "identity": identity}
    with log.paused(), jax.transfer_guard("allow"):  # Orbax reads the arrays in its own way
        checkpoints.save(step, state, content, best_step=record.best["step"])


def _evaluate(
    config: ConfigDict,
    run: Run,
    record: Record,
    log: RunLog,
    interruption: Interruption,
    step: int,
    state: TrainState,
) -> None:
    """Evaluates the state after a step, which is saved.

    Raises:
      Interrupted: a signal came; the run continues with this evaluation.
    """
    batches = eval_batches(config, run.mesh)
    try:
        with log.paused():
            figures = evaluate_state(run.programs, state, batches, run.mesh, interruption.reached)
    except Exception as error:
        if interruption.noticed or isinstance(error, Interrupted):
            raise interruption.at(step) from None
        raise
    log.evaluation(step, figures)
    record.evaluation(step, figures)


def _identity(run: Run, split: data.Split) -> dict[str, str]:
    """Returns what a run is besides its configuration, the same in all processes and at all starts."""
    return {
        "teacher": run.teacher.digest,
        "dataset": split.version,
        "images": data.sample_digest(split),
    }


def _check_identity(identity: dict[str, str], now: dict[str, str], split: data.Split, workdir: Path) -> None:
    if identity["teacher"] != now["teacher"]:
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
    if identity.get("images", now["images"]) != now["images"]:  # earlier versions did not look at them
        raise UserError(
            f"the run in {workdir} was started with other images or labels in split {split.name!r} of"
            f" {split.dataset}; put those back, or choose another workdir"
        )
