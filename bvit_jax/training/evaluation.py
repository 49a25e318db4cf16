"""Evaluation: one pass over a split, every image counted once."""

import dataclasses
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax import data
from bvit_jax.augment.normalization import Normalization
from bvit_jax.data.progress import ProgressBar
from bvit_jax.errors import UserError
from bvit_jax.models import choose
from bvit_jax.runtime import process
from bvit_jax.runtime.interruption import Interrupted
from bvit_jax.runtime.mesh import check_batch_size, local_rows, make_mesh, replicated, shard_batch
from bvit_jax.training.steps.evaluate import EvalSettings
from bvit_jax.training.steps.programs import Programs, jit_eval_step
from bvit_jax.training.steps.state import TrainState
from bvit_jax.weights.class_names import Matching, matched
from bvit_jax.workdir import runs
from bvit_jax.workdir.checkpoint import Kind

COUNTS = ("images", "bad_images")  # the same whatever the variables
BATCHES_IN_FLIGHT = 2  # while the device computes, the next batches are loaded
EMA = "ema_"  # before the names of the moving average's figures

logger = logging.getLogger(__name__)


def evaluate_state(
    programs: Programs, state: TrainState, batches: Iterable[data.Batch], mesh: Mesh, stop: Callable[[], bool]
) -> dict[str, float]:
    """Returns the figures of `evaluate` for a state in training.

    If it has a moving average, also that one's ``ema_top1``, ``ema_top5`` and ``ema_loss``, from the same
    pass over the split.

    Raises:
      Interrupted: ``stop``, which is called at every batch, returned True.
    """
    versions: dict[str, Mapping[str, Any]] = {"": programs.gather.run(state.variables)}
    if state.ema is not None:
        versions[EMA] = programs.gather.run(state.ema)
    return _evaluate(programs.evaluate.run, versions, batches, mesh, stop)


def deciding_top1(figures: Mapping[str, float]) -> float:
    """Returns the top-1 by which the best checkpoint is chosen: the moving average's if there is one."""
    return figures.get(f"{EMA}top1", figures["top1"])


def evaluate(
    step: Any, variables: Mapping[str, Any], batches: Iterable[data.Batch], mesh: Mesh
) -> dict[str, float]:
    """Returns top-1 and top-5 (shares of 1), the mean cross-entropy, and the number of images.

    Where images could not be decoded, also their number, ``bad_images``.

    Args:
      step: a compiled evaluation step, from `bvit_jax.training.steps.programs.jit_eval_step`.
      variables: parameters and running statistics.
      batches: this process's part of the split.
      mesh: the mesh that the step was compiled for.
    """
    return _evaluate(step, {"": variables}, batches, mesh, lambda: False)


def _evaluate(
    step: Any,
    versions: Mapping[str, Mapping[str, Any]],
    batches: Iterable[data.Batch],
    mesh: Mesh,
    stop: Callable[[], bool],
) -> dict[str, float]:
    """Returns the figures of several versions of the variables, under their prefixes."""
    totals: dict[str, float] = {}
    in_flight: deque[Any] = deque()

    def collect() -> None:
        for name, value in jax.device_get(in_flight.popleft()).items():
            totals[name] = totals.get(name, 0.0) + float(value)

    for batch in process.leave_ctrl_c_to_us(batches):
        if stop():
            raise Interrupted
        sharded = shard_batch(batch, mesh)
        in_flight.append(
            {
                prefix + name: value
                for prefix, variables in versions.items()
                for name, value in step(variables, sharded).items()
                if not (prefix and name in COUNTS)
            }
        )
        if len(in_flight) > BATCHES_IN_FLIGHT:
            collect()
    while in_flight:
        collect()
    images, bad = totals.pop("images"), totals.pop("bad_images")
    if not images:
        raise UserError(f"none of the {int(bad)} images of the evaluation can be decoded; prepare them again")
    figures = {name: total / images for name, total in totals.items()} | {"images": int(images)}
    return figures | ({"bad_images": int(bad)} if bad else {})


def eval_batches(config: ConfigDict, mesh: Mesh) -> Iterable[data.Batch]:
    """Returns this process's part of the evaluation split of a run."""
    rows = local_rows(mesh, config.eval_batch_size).tolist()
    return data.eval_batches(config.data, config.model.image_size, config.eval_batch_size, rows)


def _shown(config: ConfigDict, mesh: Mesh) -> Iterator[data.Batch]:
    """Yields the batches of `eval_batches` under the progress bar of the first process."""
    batches = eval_batches(config, mesh)
    if jax.process_index() > 0:
        yield from batches
        return
    total = -(-data.open_eval_split(config.data).num_examples // config.eval_batch_size)
    with ProgressBar("evaluating, batches", total) as bar:
        for batch in batches:
            yield batch
            bar.advance()


def eval_settings(config: ConfigDict, mesh: Mesh, model: nn.Module | None = None) -> EvalSettings:
    """Returns the evaluation step of a run's model, or of another model on the same images."""
    model = runs.create_model(config, mesh, train=False) if model is None else model
    at_once = choose(config, mesh, train=False).images_at_once
    normalize = Normalization(config.data.mean, config.data.std)
    return EvalSettings(model, normalize, at_once, matmul_precision=config.matmul_precision)


def evaluate_workdir(
    workdir: Path,
    kind: Kind,
    overrides: Mapping[str, Any],
    ema: bool | None = None,
    classes: Matching = "same",
) -> dict[str, Any]:
    """Evaluates a checkpoint of a training run on the evaluation split of its configuration.

    Args:
      workdir: the directory that ``train.py`` wrote.
      kind: "latest" or "best".
      overrides: settings of ``config.data`` and ``eval_batch_size`` to use instead of the run's.
      ema: whether to evaluate the moving average; if None, where the run keeps one.
      classes: how the data set's classes are found among the run's.

    Returns:
      The figures of `evaluate`, the step and the kind of the checkpoint; and of a run with a moving
      average, whether it is the average's, as ``ema``.

    Raises:
      UserError: there is no such run or checkpoint, it does not fit, it has no moving average, or the data
        set has other classes.
    """
    config = config_lib.load(workdir / "config.json")
    for key, value in overrides.items():
        node, _, name = key.rpartition(".")
        (config[node] if node else config)[name] = value
    config_lib.validate(config, allow_borders=True)
    if problem := config_lib.black_borders(config):
        logger.warning("evaluating as the run did, with black borders: in its config.json %s", problem)
    ema = runs.use_average(workdir, config, ema)
    names = runs.read_class_names(workdir, config.model.num_classes)
    mesh = make_mesh()
    step = _step(config, names, classes, mesh)
    variables, number = runs.restore(workdir, config, kind, replicated(mesh), ema=ema)
    what = "moving average in the " if ema else ""
    logger.info("evaluating the %s%s checkpoint, step %d", what, kind, number)
    figures = evaluate(step, variables, _shown(config, mesh), mesh)
    kept = {"ema": ema} if config.ema.decay else {}
    return {"checkpoint": kind, "step": number, **kept, **figures}


def evaluate_loaded(
    model: Any, path: Path, config: ConfigDict, classes: Matching = "same", network: Any = None
) -> dict[str, Any]:
    """Evaluates a model on the evaluation split of a configuration, with its own preprocessing.

    Args:
      model: a `Pretrained` or a packed model.
      path: that it was read from, for messages.
      config: its ``data`` names the data set, and its ``eval_batch_size`` is used.
      classes: how the data set's classes are found among the model's.
      network: instead of a Flax module: its ``prepare`` makes of the model's arrays those of its ``apply``.

    Returns:
      The figures of `evaluate`.

    Raises:
      UserError: the model squeezes its images, or the data set has other classes.
    """
    config = config_for(model, path, config)
    for text in model.assumed:
        logger.warning("assumed, since %s does not say: %s", path, text)
    mesh = make_mesh()
    step = _step(config, model.class_names, classes, mesh, network)
    arrays = network.prepare(model.arrays()) if network else {"batch_stats": {}, **model.arrays()}
    return evaluate(step, jax.device_put(arrays, replicated(mesh)), _shown(config, mesh), mesh)


def config_for(model: Any, path: Path, config: ConfigDict) -> ConfigDict:
    """Returns a configuration with the model, and with its preprocessing of images.

    Args:
      model: a `Pretrained` or a packed model.
      path: for messages.
      config: of the data.

    Raises:
      UserError: the model squeezes its images.
    """
    prepared = model.preprocessing
    if prepared.square:
        raise UserError(f"{path} squeezes its images to squares, which an evaluation does not; use predict")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model = ConfigDict(model.config)
        config.data.update(
            eval_resize=prepared.resize,
            eval_interpolation=prepared.interpolation,
            mean=prepared.mean,
            std=prepared.std,
        )
    return config


def _step(
    config: ConfigDict, names: Sequence[str], classes: Matching, mesh: Mesh, network: Any = None
) -> Any:
    """Returns the evaluation step for the classes of the evaluation split among those of a model."""
    check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
    found = matched(data.open_eval_split(config.data).class_names, names, classes)
    settings = eval_settings(config, mesh, network)
    if found != tuple(range(len(names))):
        settings = dataclasses.replace(settings, classes=found)
    return jit_eval_step(settings, mesh)


def to_json(figures: Mapping[str, Any]) -> str:
    """Returns figures as one line of JSON."""
    return json.dumps(dict(figures), sort_keys=True)
