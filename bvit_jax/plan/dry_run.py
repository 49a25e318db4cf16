"""What the programs of a run cost, known before it starts: they are compiled from shapes alone."""

import importlib.metadata
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.augment.normalization import Normalization
from bvit_jax.errors import UserError
from bvit_jax.plan import gpus, hlo
from bvit_jax.plan.fitting import largest_batch
from bvit_jax.plan.topology import DoesNotFit, Topology, compile_step, open_topology
from bvit_jax.runtime.chips import GIB, Chip, chip_of
from bvit_jax.training import initial
from bvit_jax.training.setup import Run, build, check, open_splits
from bvit_jax.training.steps.programs import abstract_batch
from bvit_jax.training.teacher import Teacher, check_heads, needs_teacher

logger = logging.getLogger(__name__)


def dry_run(config: ConfigDict, topology: str = "") -> dict[str, Any]:
    """Builds everything, compiles every program from shapes alone, and returns what they would cost.

    Args:
      config: of the run. Neither its data nor its teacher need to be there: without the data the number of
        steps is null, and without the teacher a DeiT-S takes its place, or for a ranking loss the
        real-valued model of the student's sizes. Weights to start from need not be there either where they
        are the teacher's.
      topology: chips to compile for, such as "v5e:4x4" or "h100"; "" means the devices that are there.

    Returns:
      ``model``, ``compute_dtype``, ``parameters`` and ``parameters_bytes``, ``devices``, ``device_kind``,
      ``images_per_device``, ``steps``, ``compile_seconds`` of the training step, ``versions``; then, of one
      device and one training step, by the compiler's analysis:

      - megabytes (10^6): ``arguments_mb`` (state, batch and teacher, and what is returned
        with the state), ``temporaries_mb``, ``program_mb`` and ``total_mb``, and where the chip is known
        ``chip_mb``, what a program may use.
      - ``gflops_per_step``, ``gb_accessed_per_step``, in whatever memory, and ``gb_of_memory_per_step``, in
        the chip's main memory (`bvit_jax.plan.hlo.hbm_bytes`); and the same three per image.
      - where the chip is known ``flops_ms`` and ``bytes_ms``, the least time that these take by the chip's
        peaks, the larger of the two, ``bound_ms``, and of all devices ``images_per_second_bound``.
      - Compiled for a GPU that is not there, operations and accessed bytes are not counted.
      - ``collectives`` by kind and ``collectives_for`` by purpose (`bvit_jax.plan.hlo`): count, and bytes of
        their results.
      - ``programs``: of each program of the run (`bvit_jax.training.steps.programs`) its megabytes, as above,
        and ``compile_seconds``; ``largest_program``, the name of the one that needs most memory, and
        ``largest_mb``.

    Raises:
      UserError: a setting or the topology is wrong, or a program does not fit on the chip.
    """
    check(config)
    target = open_topology(topology) if topology else None
    num_examples = _num_examples(config)
    run = build(config, num_examples, target.devices if target else None, _teacher(config))
    _check_init(config, run)
    start = time.perf_counter()
    try:
        compiled = _compiled(lower(run, config, config.batch_size), run)
    except DoesNotFit as error:
        raise _too_large(run, config, error) from error
    seconds = time.perf_counter() - start
    return {
        "model": config.model.name,
        "compute_dtype": config.compute_dtype,
        "parameters": models.num_params(run.state.params),
        "parameters_bytes": _bytes_of(run.state.params),
        "devices": run.mesh.size,
        "device_kind": run.mesh.devices.flat[0].device_kind,
        "images_per_device": config.batch_size // run.mesh.size,
        "steps": run.total_steps if num_examples else None,
        "compile_seconds": round(seconds, 1),
        "versions": _versions(target),
        **cost_of(compiled, run, config.batch_size),
        **_programs(run, config, compiled, seconds),
    }


def lower(run: Run, config: ConfigDict, images: int) -> Any:
    """Lowers the training step of a run for a global batch of ``images``, from shapes alone."""
    state, _, *rest = run.programs.train.arguments
    batch = abstract_batch(images, config.model.image_size, run.mesh)
    return run.programs.train.function.lower(state, batch, *rest)


def _compiled(lowered: Any, run: Run) -> Any:
    """Compiles a program; where the compiler says nothing of the memory, as for GPUs, its plan is checked.

    Raises:
      DoesNotFit: it needs more memory than the chip has.
    """
    compiled = compile_step(lowered)
    chip = chip_of(run.mesh.devices.flat[0].device_kind)
    if chip and not chip.compiler_bytes and total_bytes(compiled) > chip.hbm_bytes:
        raise DoesNotFit(total_bytes(compiled), chip.hbm_bytes)
    return compiled


def _programs(run: Run, config: ConfigDict, train: Any, seconds: float) -> dict[str, Any]:
    """Compiles all programs but the training step, and returns what each of them needs."""
    found: dict[str, dict[str, float]] = {}
    for name, program in run.programs.items():
        start, compiled, took = time.perf_counter(), train, seconds
        if program is not run.programs.train:
            try:
                compiled = _compiled(program.function.lower(*program.arguments), run)
            except DoesNotFit as error:
                raise UserError(_does_not_fit(program.name, name, run, config, error)) from error
            took = time.perf_counter() - start
        found[name] = {**_memory(compiled), "compile_seconds": round(took, 1)}
    largest = max(found, key=lambda name: found[name]["total_mb"])
    return {
        "programs": found,
        "largest_program": largest,
        "largest_mb": found[largest]["total_mb"],
    }


def _does_not_fit(title: str, name: str, run: Run, config: ConfigDict, error: DoesNotFit) -> str:
    advice = {
        "evaluate": f"lower config.eval_batch_size, which is {config.eval_batch_size}",
        "health": "set config.health=False, or raise config.accumulate_steps",
    }.get(name, f"lower config.batch_size, which is {config.batch_size}")
    needs = f"{error.needed / GIB:.2f} GiB" if error.needed else "more memory than there is"
    there = f", of {error.available / GIB:.2f} GiB for a program" if error.available else ""
    return f"{title} needs {needs} on each of {run.mesh.size} devices{there}; {advice}"


def cost_of(compiled: Any, run: Run, images: int) -> dict[str, Any]:
    """Returns the figures of `dry_run` that follow from the compiled training step."""
    chip = chip_of(run.mesh.devices.flat[0].device_kind)
    cost = compiled.cost_analysis() or {}
    flops, accessed = cost.get("flops", math.nan), cost.get("bytes accessed", math.nan)
    text = compiled.as_text()
    moved = hlo.hbm_bytes(text)
    totals = {"gflops": flops / 1e9, "gb_accessed": accessed / 1e9, "gb_of_memory": moved / 1e9}
    totals = {name: total for name, total in totals.items() if not math.isnan(total)}
    per_device = images / run.mesh.size
    figures: dict[str, Any] = {
        **_memory(compiled),
        **{f"{name}_per_step": _short(total) for name, total in totals.items()},
        **{f"{name}_per_image": _short(total / per_device) for name, total in totals.items()},
    }
    if chip:
        figures |= _bound(chip, flops, moved, images)
    collectives = hlo.collectives_of(text)
    figures["collectives"] = _traffic(hlo.by_kind(collectives))
    figures["collectives_for"] = _traffic(hlo.by_purpose(collectives))
    return figures


def table(figures: Mapping[str, Any]) -> str:
    """Returns the figures of `dry_run` as lines for people."""
    lines = []
    for name, value in figures.items():
        if not isinstance(value, Mapping):
            lines.append(f"{name.replace('_', ' '):24} {value}")
            continue
        for key, part in value.items():
            shown = part
            if isinstance(part, Mapping) and "bytes" in part:
                shown = f"{part['count']}, {part['bytes'] / 1e6:.3f} MB"
            elif isinstance(part, Mapping):
                shown = f"{part['total_mb']} MB, compiled in {part['compile_seconds']} s"
            lines.append(f"{name.replace('_', ' ') + ' ' + key.replace('_', ' '):44} {shown}")
    return "\n".join(lines)


def _memory(compiled: Any) -> dict[str, float]:
    memory = compiled.memory_analysis()
    return {
        "arguments_mb": _mb(_data_bytes(memory)),
        "temporaries_mb": _mb(memory.temp_size_in_bytes),
        "program_mb": _mb(memory.generated_code_size_in_bytes),
        "total_mb": _mb(total_bytes(compiled)),
    }


def _data_bytes(memory: Any) -> int:
    """Returns the bytes of what goes in and comes out, a donated array once."""
    return memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def total_bytes(compiled: Any) -> int:
    """Returns the bytes that a program and its data need on a device."""
    memory = compiled.memory_analysis()
    return _data_bytes(memory) + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def _bound(chip: Chip, flops: float, moved: float, images: int) -> dict[str, Any]:
    of_flops, of_bytes = flops / chip.bfloat16_flops, moved / chip.bandwidth
    counted = {} if math.isnan(flops) else {"flops_ms": _short(1e3 * of_flops)}
    seconds = max(of_bytes, of_flops)  # of bytes alone where operations are not counted
    return {
        "chip": chip.name,
        "chip_mb": _mb(chip.usable_bytes),
        **counted,
        "bytes_ms": _short(1e3 * of_bytes),
        "bound_ms": _short(1e3 * seconds),
        "images_per_second_bound": _short(images / seconds),
    }


def _traffic(traffic: Mapping[Any, hlo.Traffic]) -> dict[str, dict[str, int]]:
    return {name: {"count": t.count, "bytes": t.bytes} for name, t in traffic.items()}


def _bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _mb(size: float) -> float:
    return round(size / 1e6, 1)


def _versions(target: Topology | None) -> dict[str, str]:
    versions = {"jax": jax.__version__}
    if target and target.devices[0].platform != "tpu":
        versions |= [gpus.compiler_version() or ("jax-cuda-pjrt", "unknown")]
    elif target:
        try:
            versions["libtpu"] = importlib.metadata.version("libtpu")
        except importlib.metadata.PackageNotFoundError:  # TPU_LIBRARY_PATH names a file
            versions["libtpu"] = "unknown"
    return versions


# --- what may be missing -------------------------------------------------------------------------


def _num_examples(config: ConfigDict) -> int:
    """Returns 0 where the data is not there."""
    try:
        return open_splits(config).num_examples
    except UserError as error:
        logger.warning("the data was not checked: %s", error)
        return 0


def _teacher(config: ConfigDict) -> Teacher | None:
    """Returns a model without weights in place of a missing teacher, None where none is needed."""
    path = config.teacher.path
    if not needs_teacher(config) or (path and Path(path).expanduser().exists()):
        return None
    check_heads(config)
    missing = f"there is no {path}" if path else "config.teacher.path is empty"
    name, settings = _stand_in(config)
    logger.warning("%s: a %s in its place is what is counted", missing, name)
    size = config.model.image_size
    model = models.create_model(settings, jnp.dtype(config.compute_dtype))
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, size, size, 3))), jax.random.key(0))
    return Teacher(model, shapes, "", Normalization(config.data.mean, config.data.std))


def _check_init(config: ConfigDict, run: Run) -> None:
    """Raises `UserError` if the weights to start from do not fit, unless they are a missing teacher's."""
    path = config.init.path
    if path and path == config.teacher.path and not Path(path).expanduser().exists():
        logger.warning("the weights to start from were not checked: there is no %s", path)
    elif path:
        initial.load(config, run.state.variables)


def _stand_in(config: ConfigDict) -> tuple[str, ConfigDict]:
    """Returns the name and the settings of what takes a teacher's place.

    A ranking loss needs a teacher with the student's blocks and tokens: its own real-valued backbone.
    """
    backbone = models.real_backbone(config.model)
    if config.loss.ranking_weight and backbone:
        return f"real-valued {backbone.name} of the student's sizes", backbone
    shared = {key: config.model[key] for key in ("image_size", "num_classes")}
    return "DeiT-S", models.model_config("deit", **shared)


# --- what does not fit -------------------------------------------------------------------------


def _too_large(run: Run, config: ConfigDict, error: DoesNotFit) -> UserError:
    """Finds the largest batch that fits, and says so."""
    kind, devices = run.mesh.devices.flat[0].device_kind, run.mesh.size
    chip = chip_of(kind)
    limit = error.available or (chip.usable_bytes if chip else 0)
    asked, unit = config.batch_size // devices, _unit(config, devices)
    logger.warning("%d images on a device do not fit; looking for the largest batch that does", asked)

    def memory_of(units: int) -> int | None:
        per_device, start = units * unit, time.perf_counter()
        try:
            size = total_bytes(_compiled(lower(run, config, per_device * devices), run))
        except DoesNotFit:
            size = None
        shown = f"need {size / GIB:.2f} GiB" if size else "do not fit"
        logger.info("%d images on a device %s (%.0f s)", per_device, shown, time.perf_counter() - start)
        return size

    best, size = largest_batch(memory_of, limit, asked // unit, error.needed) if limit else (0, 0)
    best *= unit
    needs = f"needs {error.needed / GIB:.2f} GiB" if error.needed else "needs more memory than there is"
    there = f"; a {chip.name if chip else kind} has {limit / GIB:.2f} GiB for a program" if limit else ""
    if not limit:
        advice = "make it smaller"
    else:
        advice = (
            f"the largest batch that fits is {best} images on each, config.batch_size={best * devices}"
            f" ({size / GIB:.2f} GiB)"
            if best
            else f"not even {unit} on each fit"
        )
    return UserError(
        f"config.batch_size is {config.batch_size}, {asked} images on each of {devices} devices, which"
        f" {needs}{there}; {advice}"
    )


def _unit(config: ConfigDict, devices: int) -> int:
    """Returns the fewest images of a device that divide into microbatches and groups of batch norms."""
    group = config.model.get("batch_norm_group", 0) or 1
    return config.accumulate_steps * group // math.gcd(group, devices)
