"""The list of the compiled programs of a run, which the loop compiles and calls, and the dry run compiles."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from bvit_jax.models.choice import platform
from bvit_jax.runtime.mesh import batch_sharded, replicated, with_sharding
from bvit_jax.training.steps import first_batch, health
from bvit_jax.training.steps.batch import Inputs
from bvit_jax.training.steps.evaluate import EvalSettings, eval_step
from bvit_jax.training.steps.keys import run_keys
from bvit_jax.training.steps.precision import DEFAULT, at_precision
from bvit_jax.training.steps.preview import preview
from bvit_jax.training.steps.state import TrainState, create_state
from bvit_jax.training.steps.train import TrainSettings, train_step

# The same numbers on a CPU, in half of the time that LLVM takes to compile.
RUN_ONCE = {"xla_backend_optimization_level": 1}


@dataclass
class Program:
    """A jitted function with the shapes that a run calls it with.

    Attributes:
      name: for the log and for reports.
      function: the jitted function, which compiles with its first call.
      arguments: shapes, dtypes and shardings.
      run: what to call: ``function``, or what it was compiled to ahead of time.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    run: Callable[..., Any] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.run = self.function

    @property
    def compiled(self) -> bool:
        """Whether it was compiled ahead of time."""
        return self.run is not self.function


@dataclass(frozen=True)
class Programs:
    """All programs of a run.

    Attributes:
      keys: of the key of the seed: the keys of initialisation and of training.
      create: of a key and given arrays: the initial state, where it will live.
      first_batch: of the state, the first batch and the key of training: the state that the first step starts
        from; None for models that do not start from a batch.
      train: of the state, a batch, the teacher's variables and the key of training: next state and metrics.
      health: of the state, the last batch and the key of training: figures and signs; None if not measured.
      preview: of a batch, the steps before it and the key of training: images as the model sees them.
      gather: of variables: the same on every device.
      evaluate: of variables on every device and a batch of evaluation: sums over its images.
    """

    keys: Program
    create: Program
    first_batch: Program | None
    train: Program
    health: Program | None
    preview: Program
    gather: Program
    evaluate: Program

    def items(self) -> Iterator[tuple[str, Program]]:
        """Yields the programs that the run has, with the names of their attributes."""
        for field in dataclasses.fields(self):
            program = getattr(self, field.name)
            if program is not None:
                yield field.name, program


def make_programs(
    training: TrainSettings,
    evaluation: EvalSettings,
    plain: nn.Module,
    mesh: Mesh,
    state: TrainState,
    teacher_variables: Any,
    *,
    eval_batch_size: int,
    batch_size: int,
    measures_health: bool = True,
    donate: bool = True,
) -> Programs:
    """Returns the programs of a run on a mesh.

    Args:
      training: of the step.
      evaluation: of the evaluation step.
      plain: the student, neither scanned nor rematerialised, for the passes that look into it.
      mesh: of the run.
      state: shapes, dtypes and shardings of the state.
      teacher_variables: arrays or their shapes.
      eval_batch_size: global.
      batch_size: global.
      measures_health: whether the health of the network is logged.
      donate: whether a step may write the new state over the old one.
    """
    whole, spread = replicated(mesh), batch_sharded(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    size: int = training.model.image_size
    key = with_sharding(jax.eval_shape(lambda: jax.random.key(0)), whole)
    batch = abstract_batch(batch_size, size, mesh)
    seen = (state, batch, key)
    pass_of = (plain, training.inputs, training.accumulate_steps, mesh)
    kept = {"ema": state.ema is not None, "health": measures_health}
    create = jax.jit(
        lambda key, given: create_state(key, training.model, training.optimizer, size, given, **kept),
        out_shardings=shardings,
        compiler_options=RUN_ONCE if platform(mesh) == "cpu" else None,
    )
    precision = training.matmul_precision
    start = at_precision(precision, partial(first_batch.start, *pass_of))
    start = jax.jit(start, in_shardings=(shardings, spread, whole), out_shardings=shardings)
    shows = partial(preview, training.inputs)
    look = jax.jit(shows, in_shardings=(spread, whole, whole), out_shardings=whole)
    train = jit_train_step(training, mesh, shardings, donate=donate)
    teacher = with_sharding(teacher_variables, whole)
    variables = with_sharding(state.variables, whole)
    eval_batch = abstract_eval_batch(eval_batch_size, size, mesh)
    starts = first_batch.starts_from_a_batch(state)
    return Programs(
        keys=Program("the random keys", jax.jit(run_keys, out_shardings=whole), (key,)),
        create=Program("the initial state", create, (key, {})),
        first_batch=Program("what the first batch sets", start, seen) if starts else None,
        train=Program("the training step", train, (state, batch, teacher, key)),
        health=Program("the health pass", jit_health(*pass_of, precision), seen) if measures_health else None,
        preview=Program("the preview", look, (batch, with_sharding(state.step, whole), key)),
        gather=Program("the gathered variables", gatherer(mesh), (state.variables,)),
        evaluate=Program("the evaluation step", jit_eval_step(evaluation, mesh), (variables, eval_batch)),
    )


def jit_train_step(
    settings: TrainSettings, mesh: Mesh, state: Any = None, *, donate: bool = True
) -> jax.stages.Wrapped:
    """Compiles a training step for a mesh: of (state, batch, teacher's variables, key).

    Args:
      settings: of the step.
      mesh: the batch is spread over it; the teacher and the metrics are whole on every device.
      state: shardings of the training state; by default it is whole on every device.
      donate: whether the new state takes the memory of the old one.
    """
    whole = replicated(mesh)
    state = whole if state is None else state
    return jax.jit(
        at_precision(settings.matmul_precision, partial(train_step, settings)),
        in_shardings=(state, batch_sharded(mesh), whole, whole),
        out_shardings=(state, whole),
        donate_argnums=(0,) if donate else (),
    )


def jit_eval_step(settings: EvalSettings, mesh: Mesh) -> jax.stages.Wrapped:
    """Compiles an evaluation step for a mesh: of (variables, batch)."""
    whole = replicated(mesh)
    return jax.jit(
        at_precision(settings.matmul_precision, partial(eval_step, settings)),
        in_shardings=(whole, batch_sharded(mesh)),
        out_shardings=whole,
    )


def jit_health(
    model: nn.Module, inputs: Inputs, accumulate_steps: int, mesh: Mesh, matmul_precision: str = DEFAULT
) -> jax.stages.Wrapped:
    """Compiles `health.measure` for a mesh: of (state, batch, key). The state keeps its shardings."""
    whole = replicated(mesh)
    return jax.jit(
        at_precision(matmul_precision, partial(health.measure, model, inputs, accumulate_steps, mesh)),
        in_shardings=(None, batch_sharded(mesh), whole),
        out_shardings=(whole, whole),
    )


def gatherer(mesh: Mesh) -> jax.stages.Wrapped:
    """Compiles the function that returns a tree whole on every device."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def abstract_batch(images: int, image_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of a global training batch."""
    sharding, shape = batch_sharded(mesh), (images, image_size, image_size, 3)
    return {
        "image": jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((images,), np.int32, sharding=sharding),
    }


def abstract_eval_batch(images: int, image_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of a global batch of evaluation."""
    sharding = batch_sharded(mesh)
    return {
        **abstract_batch(images, image_size, mesh),
        "mask": jax.ShapeDtypeStruct((images,), np.bool_, sharding=sharding),
        "bad": jax.ShapeDtypeStruct((images,), np.int32, sharding=sharding),
    }
