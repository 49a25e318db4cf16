"""What a configuration becomes before the first step: mesh, models, schedule, the compiled step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from bvit_jax.runtime.mesh import batch_sharded, check_batch_size, make_mesh, replicated
from bvit_jax.training.steps import health, preview
from bvit_jax.training.steps.first_batch import jit_start, make_start, starts_from_a_batch
from bvit_jax.training.steps.state import TrainState, abstract_state, create_state
from bvit_jax.training.steps.train import TrainStep, jit_train_step, make_train_step
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
      schedule: learning rate of each step.
      state: shapes and shardings of the state.
      create: makes the initial state of a key, where it will live; of a key and the arrays of
        `bvit_jax.training.initial.load`, whole on every device, the state that starts from those.
      gather: returns parameters and statistics whole on every device.
      step: the training step, to be compiled by its first call or ahead of time.
      start: what comes before the first step, see `bvit_jax.training.steps.first_batch`; None if nothing
      does.
      plain_step: the same without rematerialisation, scans and microbatches, to count its operations.
      health: the health of a binary network, see `bvit_jax.training.steps.health`; None if it is not
      measured.
      look: what the model sees of a batch, see `bvit_jax.training.steps.preview`.
      steps_per_epoch, total_steps: lengths in steps.
    """

    mesh: Mesh
    model: nn.Module
    teacher: Teacher
    schedule: Any
    state: TrainState
    create: Any
    gather: Any
    step: Any
    start: Any
    plain_step: Any
    health: Any
    look: Any
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
    image_size = config.model.image_size
    model = runs.create_model(config, mesh, train=True)
    teacher = load_teacher(config) if teacher is None else teacher
    ranking = make_ranking(config, model, teacher.model)
    steps_per_epoch = data.steps_per_epoch(num_examples, config.batch_size)
    schedule = optim.make_schedule(
        config.optim,
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
    )
    optimizer = optim.make_optimizer(config.optim, schedule)
    normalize = Normalization(config.data.mean, config.data.std)
    augmentation = Augmentation(Erasing(**config.erase), Mixing(**config.mix))

    def make_step(model: nn.Module, accumulate_steps: int) -> TrainStep:
        return make_train_step(
            model,
            optimizer,
            normalize,
            teacher=teacher.model,
            teacher_normalize=teacher.normalize,
            teacher_targets=config.loss.teacher_targets,
            distillation_weight=config.loss.distillation_weight,
            label_smoothing=config.loss.label_smoothing,
            ranking=ranking,
            augmentation=augmentation,
            accumulate_steps=accumulate_steps,
            ema_decay=config.ema.decay,
            mesh=mesh,
        )

    # Layers in a scan cannot tell of themselves, and what a loop repeats is counted once.
    plain = models.create_model(config.model, jnp.dtype(config.compute_dtype))
    measure = health.make_health_step(plain, normalize, augmentation=augmentation)
    look = preview.make_look(normalize, augmentation=augmentation)
    kept = {"ema": config.ema.decay > 0, "health": config.health}
    state = abstract_state(model, optimizer, image_size, mesh, **kept)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    start = make_start(
        plain,
        normalize,
        augmentation=augmentation,
        accumulate_steps=config.accumulate_steps,
        mesh=mesh,
    )
    return Run(
        mesh=mesh,
        model=model,
        teacher=teacher,
        schedule=schedule,
        state=state,
        create=jax.jit(
            lambda key, given=None: create_state(key, model, optimizer, image_size, given, **kept),
            out_shardings=shardings,
        ),
        gather=jax.jit(lambda tree: tree, out_shardings=replicated(mesh)),
        step=jit_train_step(make_step(model, config.accumulate_steps), mesh, shardings, donate=donate),
        start=jit_start(start, mesh, shardings) if starts_from_a_batch(state) else None,
        plain_step=jit_train_step(make_step(plain, 1), mesh, shardings),
        health=health.jit_health_step(measure, mesh) if config.health else None,
        look=preview.jit_look(look, mesh),
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
    )


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


def abstract_batch(images: int, image_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of a global training batch."""
    sharding, shape = batch_sharded(mesh), (images, image_size, image_size, 3)
    return {
        "image": jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((images,), np.int32, sharding=sharding),
    }
