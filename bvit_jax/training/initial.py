"""Runs that start from given weights: which arrays of a file a model takes, and which it initialises."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from bvit_jax.errors import UserError
from bvit_jax.files import any_path
from bvit_jax.models import same_layers
from bvit_jax.training.teacher import finite
from bvit_jax.weights import resize
from bvit_jax.weights.naming import path_name
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.weights.state_dicts import StateDict, StateDictError, Variables, check_fit
from bvit_jax.workdir import runs

MAX_OPTIONAL_NDIM = 1  # of arrays that the model or the file may lack: scales, shifts, biases, flags
# Settings of models that change no shape.
_SHAPELESS = {
    "name",
    "norm_epsilon",
    "dropout",
    "attention_dropout",
    "drop_path",
    "weight_init",
    "weight_bits",
    "act_bits",
    "clip_val",
    "batch_norm_group",
    "estimator",
    "recu",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Which arrays of a file a model takes, by their paths, such as "params/head/kernel".

    Attributes:
      taken: those that both have.
      kept: those that only the model has, which keep their own initial values.
      left_out: those that only the file has.
    """

    taken: tuple[str, ...]
    kept: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Initial:
    """Weights that a new run starts from.

    Attributes:
      variables: what the model takes, float32: a tree of some of its ``params`` and ``batch_stats``.
      digest: SHA-256 of the weights in the file; "" where none are given.
    """

    variables: Variables
    digest: str


NOTHING = Initial({}, "")


def select(arrays: StateDict, shapes: Mapping[str, tuple[int, ...]]) -> Selection:
    """Decides which arrays of a file a model takes.

    Arrays of at most one dimension may be missing on either side: those are scales, shifts, zero points and
    flags of quantisers, and biases that binary layers do not have. Kernels, tokens and position embeddings
    may not.

    Args:
      arrays: of the file, by their paths.
      shapes: of the model's variables, by their paths.

    Raises:
      StateDictError: an array of more dimensions is missing on a side, or one has another shape in the
        file, or holds no floating-point numbers.
    """
    check_fit(
        {name: a for name, a in arrays.items() if name in shapes or a.ndim > MAX_OPTIONAL_NDIM},
        {name: s for name, s in shapes.items() if name in arrays or len(s) > MAX_OPTIONAL_NDIM},
    )
    return Selection(
        taken=tuple(sorted(arrays.keys() & shapes.keys())),
        kept=tuple(sorted(shapes.keys() - arrays.keys())),
        left_out=tuple(sorted(arrays.keys() - shapes.keys())),
    )


def load(config: ConfigDict, abstract: Variables) -> Initial:
    """Reads the weights that ``config.init`` names, and logs which of them are used.

    For a run with a moving average they are the average. All processes call this.

    Args:
      config: of the run.
      abstract: the model's ``params`` and ``batch_stats``, or their shapes.

    Raises:
      UserError: the weights cannot be read, or do not fit the model.
    """
    path = any_path(config.init.path)
    try:
        source = finite(runs.load_model(path), path)
    except UserError as error:
        raise UserError(f"config.init.path: {error}") from error
    if config.init.adapt:
        source = resize.adapted(source, config.model.image_size, config.model.num_classes)
    arrays = {name: np.asarray(a) for name, a in _flat(source.variables).items()}
    shapes = {name: leaf.shape for name, leaf in _flat(abstract).items()}
    try:
        selection = select(arrays, shapes)
    except StateDictError as error:
        advice = _advice(source.config, config.model)
        raise UserError(f"config.init.path: the weights in {path} have {error}; {advice}") from error
    _log(path, selection, arrays)
    _log_normalization(source, config)
    taken = {tuple(name.split("/")): np.asarray(arrays[name], np.float32) for name in selection.taken}
    return Initial(unflatten_dict(taken), source.digest())


def _flat(variables: Variables) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}


def _advice(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Returns advice for weights that do not fit, from the settings of both models."""
    if not same_layers(theirs["name"], ours["name"]):
        return (
            f"they are of the model {theirs['name']} and config.model.name is {ours['name']}; name weights of"
            " a model with the same layers"
        )
    keys = [key for key in ours if key in theirs and key not in _SHAPELESS]
    different = [key for key in keys if _plain(theirs[key]) != _plain(ours[key])]
    if not different:
        return "name other weights"
    settings = ", ".join(f"config.model.{key}={_plain(theirs[key])}" for key in different)
    here = ", ".join(str(_plain(ours[key])) for key in different)
    advice = f"they are of a model with {settings}, where this run has {here}: change that or name others"
    if {"image_size", "num_classes"} & set(different):
        advice += "; or adapt them: config.init.adapt=True"
    return advice


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _log(path: Path, selection: Selection, arrays: StateDict) -> None:
    values = sum(arrays[name].size for name in selection.taken)
    logger.info(
        "starting from %s: %d arrays with %s values are taken%s; %d keep their own start%s;"
        " %d of the file are left out%s",
        path,
        len(selection.taken),
        f"{values:,}",
        _example(selection.taken),
        len(selection.kept),
        _example(selection.kept),
        len(selection.left_out),
        _example(selection.left_out),
    )


def _example(names: tuple[str, ...]) -> str:
    # The last: parameters come after statistics.
    return f", such as {names[-1]}" if names else ""


def _log_normalization(source: Pretrained, config: ConfigDict) -> None:
    """Logs if images are normalised in another way than those that the weights were trained on."""
    theirs, ours = source.preprocessing, config.data
    if np.allclose([theirs.mean, theirs.std], [ours.mean, ours.std], rtol=1e-6, atol=0):
        return
    logger.info(
        "these weights were trained on images with config.data.mean=%s and config.data.std=%s, and this run"
        " normalises with %s and %s: it starts worse than they were",
        theirs.mean,
        theirs.std,
        tuple(ours.mean),
        tuple(ours.std),
    )
