"""The steps of bvit_jax as training runs them, on random data, with a teacher free of cost."""

import dataclasses
import functools
import importlib.util
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from workload import (
    LEARNING_RATE,
    Compilation,
    Facts,
    Kind,
    Memory,
    Plan,
    known_model,
    process_memory,
)

from bvit_jax.errors import UserError
from bvit_jax.models import ModelOutput, create_model, num_params
from bvit_jax.optim import make_optimizer
from bvit_jax.sharding import batch_sharded, make_mesh, replicated
from bvit_jax.step import (
    Normalization,
    default_images_at_once,
    jit_eval_step,
    jit_train_step,
    make_eval_step,
    make_train_step,
)
from bvit_jax.train_state import TrainState, create_state

NORMALIZE = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class FixedTeacher(nn.Module):
    """A teacher whose logits are a variable: distillation without the cost of a second model."""

    batch: int
    num_classes: int

    @nn.compact
    def __call__(self, images: Array) -> ModelOutput:
        shape = (self.batch, self.num_classes)
        logits = self.param("logits", nn.initializers.normal(1.0), shape)
        return ModelOutput(logits, (logits,))


class JaxSide:
    """The compiled training and evaluation steps of one model."""

    def __init__(self, plan: Plan) -> None:
        jax.config.update("jax_enable_compilation_cache", False)  # the compile time is measured
        self._mesh = make_mesh()
        _check_devices(plan, self._mesh.size)
        settings, dtype = model_of(plan)
        model: Any = create_model(settings, dtype)
        optimizer = fixed_optimizer()
        teacher = FixedTeacher(plan.batch, model.num_classes)

        whole = replicated(self._mesh)
        self._key = jax.device_put(jax.random.key(0), whole)
        self._images_and_labels = random_batch(plan.batch, model, self._mesh)
        mask = jax.device_put(np.ones(plan.batch, bool), batch_sharded(self._mesh))
        self._eval_batch = {**self._images_and_labels, "mask": mask, "bad": jnp.where(mask, -1, 0)}
        variables = teacher.init(self._key, self._images_and_labels["image"])
        self._teacher_variables = jax.device_put(variables, whole)
        initial = functools.partial(
            create_state, model=model, optimizer=optimizer, image_size=model.image_size
        )
        self._state: TrainState = jax.jit(initial, out_shardings=whole)(self._key)

        at_once = default_images_at_once(self._mesh)
        evaluate = make_eval_step(model, NORMALIZE, images_at_once=at_once)
        train = make_train_step(model, optimizer, NORMALIZE, teacher=teacher)
        self._jitted: dict[Kind, Any] = {
            "forward": jit_eval_step(evaluate, self._mesh),
            "training": jit_train_step(train, self._mesh),
        }
        self._compiled: dict[Kind, Any] = {}
        self.facts = Facts(
            version=jax.__version__,
            device=f"{self._mesh.size} x {jax.devices()[0].device_kind}",
            precision=jnp.dtype(dtype).name,
            settings={"name": settings["name"], **_settings_of(model)},
            parameters=num_params(self._state.params),
        )

    def compile(self) -> Compilation:
        """Compiles the steps ahead of time."""
        result = Compilation()
        for kind, jitted in self._jitted.items():
            began = time.perf_counter()
            compiled = jitted.lower(*self._arguments(kind)).compile()
            result.compile_seconds[kind] = time.perf_counter() - began
            if (analysis := compiled.memory_analysis()) is not None:
                result.temporary_bytes[kind] = analysis.temp_size_in_bytes
            self._compiled[kind] = compiled
        return result

    def step(self, kind: Kind) -> None:
        """Runs one step and waits for its result."""
        result = self._compiled[kind](*self._arguments(kind))
        if kind == "training":
            self._state = result[0]  # the one before is donated
        jax.block_until_ready(result)

    def memory(self) -> Memory:
        """Returns the peak of the first device, or of the process where devices do not count."""
        statistics = jax.local_devices()[0].memory_stats()
        if statistics and "peak_bytes_in_use" in statistics:
            return Memory(statistics["peak_bytes_in_use"], "device")
        return process_memory()

    def _arguments(self, kind: Kind) -> tuple[Any, ...]:
        if kind == "forward":
            return self._state.variables, self._eval_batch
        return self._state, self._images_and_labels, self._teacher_variables, self._key


def start(plan: Plan, context: None) -> JaxSide:
    """Builds and compiles the JAX side; see `workload.Worker`."""
    del context
    return JaxSide(plan)


def random_batch(batch: int, model: Any, mesh: Mesh) -> dict[str, Array]:
    """Returns random images and labels, spread over the mesh."""
    generator = np.random.default_rng(0)
    size = model.image_size
    arrays = {
        "image": generator.integers(0, 256, (batch, size, size, 3), np.uint8),
        "label": generator.integers(0, model.num_classes, batch, np.int32),
    }
    return jax.device_put(arrays, batch_sharded(mesh))


def fixed_optimizer() -> optax.GradientTransformation:
    """Returns the optimiser of the binary recipe, with a constant learning rate."""
    settings: Any = SimpleNamespace(
        learning_rate=LEARNING_RATE,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_grad_norm=0.0,
        rules=(),
    )
    return make_optimizer(settings, lambda step: jnp.float32(LEARNING_RATE))


def _check_devices(plan: Plan, devices: int) -> None:
    if plan.reference and devices > 1:
        raise UserError(
            f"{devices} devices are visible, and the reference uses one; show one device, as with"
            " CUDA_VISIBLE_DEVICES=0"
        )
    if plan.batch % devices:
        raise UserError(f"--batch is {plan.batch}; expected a multiple of the {devices} devices")


def model_of(plan: Plan) -> tuple[dict[str, Any], str]:
    """Returns the settings of the model, its name among them, and its compute dtype."""
    if plan.config is None:
        settings, dtype = known_model(plan.model or ""), "float32"
    else:
        config = load_config(plan.config)
        settings, dtype = config.model.to_dict(), config.compute_dtype
    return {**settings, **plan.overrides}, plan.dtype or dtype


def load_config(text: str) -> Any:
    """Returns ``get_config(argument)`` of ``FILE[:argument]``.

    Raises:
      UserError: the file is missing, is no experiment or needs a package that is missing.
    """
    name, colon, argument = text.partition(":")
    path = Path(name)
    spec = importlib.util.spec_from_file_location("benchmark_config", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--config is {text}: there is no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"--config {text} cannot be imported: {error}; or use --model") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config is {text}: {path} has no get_config")
    return module.get_config(argument) if colon else module.get_config()


def _settings_of(model: Any) -> dict[str, Any]:
    """Returns the settings of a model and their values: its own fields and those of its blocks."""
    block = getattr(model, "block", None)
    owners = [model] if block is None else [model, block]
    return {
        field.name: getattr(owner, field.name)
        for owner in owners
        for field in dataclasses.fields(owner)
        if field.name not in ("parent", "name", "dtype", "block")
    }
