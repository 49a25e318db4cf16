"""The steps of bvit_jax as training runs them, on random data, with a teacher free of cost."""

import dataclasses
import functools
import importlib.util
import multiprocessing
import time
from collections.abc import Mapping
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

from benchmarks.workload import (
    LEARNING_RATE,
    Compilation,
    Facts,
    Kind,
    Memory,
    Plan,
    Work,
    known_model,
    process_memory,
)
from bvit_jax.augment.normalization import Normalization
from bvit_jax.cost.count import BINARY, cost_of
from bvit_jax.cost.program import trace
from bvit_jax.cost.values import analyse
from bvit_jax.errors import UserError
from bvit_jax.models import Execution, ModelOutput, create_model, num_params, packs_signs
from bvit_jax.models.choice import images_at_once, one_cpu
from bvit_jax.models.settings import KINDS
from bvit_jax.optim import make_optimizer
from bvit_jax.plan.hlo import hbm_bytes
from bvit_jax.runtime import process
from bvit_jax.runtime.allocator import keep_freed_memory
from bvit_jax.runtime.compilation import lower
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated
from bvit_jax.training.steps.batch import Inputs
from bvit_jax.training.steps.evaluate import EvalSettings
from bvit_jax.training.steps.programs import jit_eval_step, jit_train_step
from bvit_jax.training.steps.state import TrainState, create_state
from bvit_jax.training.steps.train import Objective, TrainSettings

NORMALIZE = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CACHE_HIT = "/jax/compilation_cache/cache_hits"  # an event of jax.monitoring
PRODUCTS = ("dot_general", "conv_general_dilated")


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
        if not plan.plain:
            keep_freed_memory()
        _use_cache(plan.cache)
        self._hits = 0
        jax.monitoring.register_event_listener(self._count_hits)
        self._mesh = make_mesh()
        _check_devices(plan, self._mesh.size)
        settings, dtype = model_of(plan)
        packed = one_cpu(self._mesh) and packs_signs(settings["name"]) and not plan.plain
        trained = {"packed": packed, "scan_blocks": packed, **plan.execution}
        model: Any = create_model(settings, dtype, Execution(**trained))
        evaluated = create_model(settings, dtype, Execution(packed=packed))
        optimizer = fixed_optimizer()
        teacher = FixedTeacher(plan.batch, model.num_classes)

        everywhere = replicated(self._mesh)
        self._key = jax.device_put(jax.random.key(0), everywhere)
        self._images_and_labels = random_batch(plan.batch, model, self._mesh)
        mask = jax.device_put(np.ones(plan.batch, bool), batch_sharded(self._mesh))
        self._eval_batch = {**self._images_and_labels, "mask": mask, "bad": jnp.where(mask, -1, 0)}
        variables = teacher.init(self._key, self._images_and_labels["image"])
        self._teacher_variables = jax.device_put(variables, everywhere)
        initial = functools.partial(
            create_state, model=model, optimizer=optimizer, image_size=model.image_size
        )
        self._state: TrainState = jax.jit(initial, out_shardings=everywhere)(self._key)

        at_once = images_at_once(self._mesh, packed)
        evaluate = EvalSettings(evaluated, NORMALIZE, images_at_once=at_once)
        train = TrainSettings(model, optimizer, Inputs(NORMALIZE), Objective(teacher))
        jitted: dict[Kind, Any] = {
            "forward": _jit_forward(evaluated, self._mesh),
            "evaluation": jit_eval_step(evaluate, self._mesh),
            "training": jit_train_step(train, self._mesh),
        }
        self._jitted = {kind: jitted[kind] for kind in plan.kinds}
        self._normalized = jax.device_put(
            NORMALIZE(self._images_and_labels["image"]), batch_sharded(self._mesh)
        )
        self._plain_model = create_model(settings, dtype)
        self._compiled: dict[Kind, Any] = {}
        self.facts = Facts(
            version=jax.__version__,
            device=f"{self._mesh.size} x {jax.devices()[0].device_kind}",
            dtype=jnp.dtype(dtype).name,
            mode="plain" if plan.plain else "",
            settings={"name": settings["name"], **settings_of(model)},
            parameters=num_params(self._state.params),
            devices=self._mesh.size,
        )

    def compile(self) -> Compilation:
        """Compiles the steps ahead of time, and counts what the model asks for."""
        result = Compilation(work=work_of(self._plain_model, self._state))
        for kind, jitted in self._jitted.items():
            began = time.perf_counter()
            compiled = lower(jitted, *self._arguments(kind)).compile()
            result.compile_seconds[kind] = time.perf_counter() - began
            if (analysis := compiled.memory_analysis()) is not None:
                result.temporary_bytes[kind] = analysis.temp_size_in_bytes
            if (text := compiled.as_text()) is not None:
                result.accessed_bytes[kind] = hbm_bytes(text)
            counted = _cost_analysis(compiled)
            for name, of_kind in (
                ("flops", result.compiler_flops),
                ("bytes accessed", result.compiler_bytes),
            ):
                if name in counted:
                    of_kind[kind] = counted[name]
            self._compiled[kind] = compiled
        return result

    def step(self, kind: Kind) -> None:
        """Runs one step and waits for its result."""
        result = self._compiled[kind](*self._arguments(kind))
        if kind == "training":
            self._state = result[0]  # the one before is donated
        jax.block_until_ready(result)

    def first_step(self, kind: Kind) -> float | None:
        """Returns the seconds of lowering, loading and running a step, None if it had to be compiled."""
        self._hits, began = 0, time.perf_counter()
        self._compiled[kind] = lower(self._jitted[kind], *self._arguments(kind)).compile()
        process.release_memory()  # as a training run does
        self.step(kind)
        seconds = time.perf_counter() - began
        return seconds if self._hits else None

    def _count_hits(self, event: str, **details: Any) -> None:
        del details
        self._hits += event == CACHE_HIT

    def memory(self) -> Memory:
        """Returns the peak of the first device, or of the process where devices do not count."""
        statistics = jax.local_devices()[0].memory_stats()
        if statistics and "peak_bytes_in_use" in statistics:
            return Memory(statistics["peak_bytes_in_use"], "device")
        return process_memory()

    def _arguments(self, kind: Kind) -> tuple[Any, ...]:
        if kind == "forward":
            return self._state.variables, self._normalized
        if kind == "evaluation":
            return self._state.variables, self._eval_batch
        return self._state, self._images_and_labels, self._teacher_variables, self._key


def start(plan: Plan, context: None) -> JaxSide:
    """Builds the JAX side; see `workload.Worker`."""
    del context
    if multiprocessing.parent_process() is not None:
        process.take()  # its own, in which compiling is as in a training run
    return JaxSide(plan)


def _use_cache(directory: Path | None) -> None:
    """Caches everything that is compiled in a directory, however small; with None, nothing."""
    if directory is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _jit_forward(model: nn.Module, mesh: Mesh) -> Any:
    """Compiles the model in evaluation mode, from normalised images to logits."""

    def forward(variables: Any, images: Array) -> Array:
        output: Any = model.apply(variables, images)
        return output.logits

    batch = batch_sharded(mesh)
    return jax.jit(forward, in_shardings=(replicated(mesh), batch), out_shardings=batch)


def _cost_analysis(compiled: Any) -> Mapping[str, float]:
    """Returns XLA's counts of a compiled function, empty where its backend has none."""
    analysis = compiled.cost_analysis()
    if isinstance(analysis, list):  # one of each program, in some versions
        analysis = analysis[0] if analysis else None
    return analysis or {}


def work_of(model: Any, state: TrainState) -> Work:
    """Counts what a model asks for, by tracing it; see `floor` for what it is used for.

    The multiply-accumulates are those of `bvit_jax.cost`. The activations are those of the same model in
    training mode, whose products are all products of matrices or convolutions.
    """
    macs = cost_of(model, model.image_size, training=False).total.macs
    variables = state.variables
    return Work(
        binary_macs=macs[BINARY],
        real_macs=sum(macs.values()) - macs[BINARY],
        elements=_product_elements(model, variables),
        variable_bytes=_tree_bytes(variables),
        state_bytes=_tree_bytes((variables, state.opt_state)),
    )


def _product_elements(model: Any, variables: Any) -> int:
    """Returns the elements of the activations that products take, each once, and of those that they give."""
    size = model.image_size
    params = variables["params"]
    others = {name: tree for name, tree in variables.items() if name != "params"}

    def logits(params: Any, others: Any, images: Any, key: Any) -> Any:
        output, _ = model.apply(
            {"params": params, **others}, images, train=True, rngs={"dropout": key}, mutable=list(others)
        )
        return output.logits

    key = jax.eval_shape(lambda: jax.random.key(0))
    program = trace(logits, params, others, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), key)
    values = analyse(program, lambda name: name[0] in ("0", "1"))
    taken: dict[Any, int] = {}
    given: dict[Any, int] = {}
    for operation in program.operations:
        if operation.name in PRODUCTS:
            for nodes, found in ((operation.inputs[:2], taken), (operation.outputs, given)):
                varying = [node for node in nodes if values[node].varies]
                found.update({node: operation.times * node.size for node in varying})
    return sum(taken.values()) + sum(given.values())


def _tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


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


def settings_of(model: Any) -> dict[str, Any]:
    """Returns the settings of a model and their values: its own fields and those of its blocks."""
    block = getattr(model, "block", None)
    owners = [model] if block is None else [model, block]
    values = {
        field.name: getattr(owner, field.name) for owner in owners for field in dataclasses.fields(owner)
    }
    return {key: value for key, value in values.items() if type(value) in KINDS}
