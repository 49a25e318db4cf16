"""From a configuration to a run: mesh, models, schedule, and the programs that are compiled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax import data, models, optim
from bvit_jax.augment.augmentation import Augmentation
from bvit_jax.augment.erasing import Erasing
from bvit_jax.augment.mixing import Mixing
from bvit_jax.augment.normalization import Normalization
from bvit_jax.errors import UserError
from bvit_jax.losses.regularization import Regularization
from bvit_jax.runtime.mesh import check_batch_size, make_mesh
from bvit_jax.training.evaluation import eval_settings
from bvit_jax.training.steps.batch import Inputs
from bvit_jax.training.steps.precision import DEFAULT
from bvit_jax.training.steps.programs import Program, Programs, jit_train_step, make_programs
from bvit_jax.training.steps.state import TrainState, abstract_state
from bvit_jax.training.steps.train import Objective, TrainSettings
from bvit_jax.training.teacher import Teacher, load_teacher, make_ranking
from bvit_jax.workdir import runs


def check(config: ConfigDict) -> None:
    """Raises `UserError` naming the first wrong setting, before anything is read or made."""
    config_lib.validate(config)
    optim.parse_rules(config.optim.rules)
    data.train_augment(config.data)


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


@dataclass(frozen=True)
class Run:
    """What is built from a configuration before the first step.

    Attributes:
      mesh: the devices.
      model: the student.
      teacher: see `Teacher`.
      schedule: from the number of steps taken to the learning rate of the next.
      state: shapes, dtypes and shardings of the state.
      programs: everything that is compiled.
      plain_step: the training step without rematerialisation, scans and microbatches, whose operations are
        counted; it never runs.
      steps_per_epoch: in steps.
      total_steps: in steps.
    """

    mesh: Mesh
    model: nn.Module
    teacher: Teacher
    schedule: optax.Schedule
    state: TrainState
    programs: Programs
    plain_step: Program
    steps_per_epoch: int
    total_steps: int


def build(
    config: ConfigDict,
    num_examples: int,
    devices: Sequence[jax.Device] | None = None,
    teacher: Teacher | None = None,
    *,
    donate: bool = True,
) -> Run:
    """Builds everything that training needs but the data, and checks that it fits together.

    Args:
      config: of the run.
      num_examples: of the training split.
      devices: by default all of all processes.
      teacher: in place of the one that ``config.teacher`` names.
      donate: whether a step may write the new state over the old one.

    Raises:
      UserError: settings do not fit together or the devices, or the teacher cannot be read.
    """
    mesh = make_mesh(devices, config.mesh.fsdp)
    check_batch_size("batch_size", config.batch_size, mesh)
    check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
    _check_microbatch(config, mesh)
    model = runs.create_model(config, mesh, train=True)
    teacher = load_teacher(config) if teacher is None else teacher
    steps_per_epoch = data.steps_per_epoch(num_examples, config.batch_size)
    schedule = optim.make_schedule(
        config.optim, batch_size=config.batch_size, steps_per_epoch=steps_per_epoch, epochs=config.epochs
    )
    training = _train_settings(config, mesh, model, teacher, schedule, steps_per_epoch)
    kept = {"ema": config.ema.decay > 0, "health": config.health}
    state = abstract_state(model, training.optimizer, config.model.image_size, mesh, **kept)
    # Layers in a scan cannot report, and the operations of a loop are counted once.
    plain = models.create_model(config.model, jnp.dtype(config.compute_dtype))
    programs = make_programs(
        training,
        eval_settings(config, mesh),
        plain,
        mesh,
        state,
        teacher.variables,
        batch_size=config.batch_size,
        eval_batch_size=config.eval_batch_size,
        measures_health=config.health,
        donate=donate,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    plain_step = jit_train_step(replace(training, model=plain, accumulate_steps=1), mesh, shardings)
    return Run(
        mesh=mesh,
        model=model,
        teacher=teacher,
        schedule=schedule,
        state=state,
        programs=programs,
        plain_step=replace(programs.train, name="the plain step", function=plain_step),
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
    )


def _train_settings(
    config: ConfigDict,
    mesh: Mesh,
    model: nn.Module,
    teacher: Teacher,
    schedule: optax.Schedule,
    steps_per_epoch: int,
) -> TrainSettings:
    normalize = Normalization(config.data.mean, config.data.std)
    return TrainSettings(
        model,
        optim.make_optimizer(config.optim, schedule),
        Inputs(normalize, Augmentation(Erasing(**config.erase), Mixing(**config.mix))),
        Objective(
            teacher.model,
            teacher.normalize,
            config.loss.teacher_targets,
            config.loss.distillation_weight,
            config.loss.label_smoothing,
            make_ranking(config, model, teacher.model),
            _regularization(config, steps_per_epoch),
            # A CPU's products are not rounded, and their programs stay what they were.
            teacher_precision=DEFAULT if models.choice.platform(mesh) == "cpu" else "highest",
        ),
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema.decay,
        mesh=mesh,
        matmul_precision=config.matmul_precision,
    )


def _regularization(config: ConfigDict, steps_per_epoch: int) -> Regularization | None:
    weight, start = config.loss.regularization_weight, config.loss.regularization_start
    return Regularization(weight, round(start * config.epochs * steps_per_epoch)) if weight else None


def _check_microbatch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises `UserError` if a batch does not divide into microbatches, or these into groups."""
    k, group = config.accumulate_steps, config.model.get("batch_norm_group", 0)
    if config.batch_size % (k * mesh.size):
        raise UserError(
            f"config.batch_size is {config.batch_size}; expected a multiple of {k * mesh.size} ="
            f" config.accumulate_steps * {mesh.size} devices"
        )
    if group and config.batch_size // k % group:
        raise UserError(
            f"config.model.batch_norm_group is {group}; expected a divisor of the"
            f" {config.batch_size // k} images of a microbatch, config.batch_size / config.accumulate_steps"
        )
