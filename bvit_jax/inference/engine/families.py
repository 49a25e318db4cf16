"""The families of the engine: each has a file here with ``apply``, and one in `folding` with ``fold``."""

import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from bvit_jax.errors import UserError
from bvit_jax.imports.shapes import Float
from bvit_jax.inference.engine.compiled import best
from bvit_jax.inference.engine.levels import XLA, Operations
from bvit_jax.inference.engine.parameters import Parameters
from bvit_jax.inference.engine.repeated import stack

FAMILIES = {
    "bhvit": "bhvit",
    "binaryvit": "binaryvit",
    "bivit_deit": "bivit",
    "bivit_release_deit": "bivit",
    "bivit_release_swin": "bivit",
    "bivit_swin": "bivit",
    "react_deit": "binaryvit",
}


def module_of(name: str, package: str) -> Any:
    """Returns the file of a model's family in a package; raises `UserError` if the engine does not run it."""
    if name not in FAMILIES:
        raise UserError(f"a {name!r} model cannot be packed; expected one of {', '.join(sorted(FAMILIES))}")
    return importlib.import_module(f"{package}.{FAMILIES[name]}")


def prepared(
    settings: Mapping[str, Any], arrays: Mapping[str, Any], operations: Operations | None = None
) -> dict[str, Any]:
    """Returns arrays with which `apply` compiles faster: those of blocks that are alike are stacked.

    Where the operations are compiled already they are not, since there is little left to compile.
    """
    if (operations or best()) is not XLA:
        return dict(arrays)
    return stack(arrays, module_of(settings["name"], __package__).runs(settings))


def apply(
    settings: Mapping[str, Any],
    arrays: Mapping[str, Any],
    images: Float[Array, "images height width 3"],
    operations: Operations | None = None,
) -> Float[Array, "images classes"]:
    """Returns the logits of a folded model, in the dtype of its arrays.

    Args:
      settings: the model's name and all of its settings.
      arrays: what `bvit_jax.inference.engine.fold.fold` returned for it, or `prepared` made of that.
      images: normalised.
      operations: what computes its steps; the fastest that can run here if None.
    """
    parameters = Parameters(arrays)
    images = images.astype(jnp.asarray(parameters["head/bias"]).dtype)
    logits: Array = module_of(settings["name"], __package__).apply(
        settings, parameters, images, operations or best()
    )
    return logits
