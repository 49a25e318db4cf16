"""Checkpoints of Bi-ViT's released code: the names of its backbones, and those of its quantisers.

The linear layers of a block have a bias that the code creates but never adds. It does not affect the
function and is kept, with the other arrays of that kind, for the way back.

Source: the behaviour of github.com/YanjingLi0202/Bi-ViT.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bvit_jax.errors import UserError
from bvit_jax.models import family
from bvit_jax.weights.formats import timm
from bvit_jax.weights.formats.base import (
    Arrays,
    Config,
    Format,
    Interpretation,
    check_epsilon,
)
from bvit_jax.weights.naming import BIVIT_DEIT, BIVIT_SWIN, Naming
from bvit_jax.weights.preprocessing import Preprocessing
from bvit_jax.weights.raw_checkpoint import RawCheckpoint

NAME = "bivit"
SWIN, DEIT = "bivit_release_swin", "bivit_release_deit"
MODELS = (DEIT, SWIN)

_DEIT_SCALE = "blocks.0.attn.q_act.alpha"
_SWIN_SCALE = "layers.0.blocks.0.attn.q_act.alpha"


def naming(config: Config) -> Naming:
    """Returns the names of the arrays of a model of `MODELS`."""
    return BIVIT_SWIN if config["name"] == SWIN else BIVIT_DEIT


def check(config: Config) -> None:
    """Raises `UserError` if the code cannot compute this model of `MODELS`."""
    if config["name"] == SWIN:
        check_epsilon("Bi-ViT's Swin", timm.SWIN_NORM_EPSILON, config)
        return
    if config["distillation_token"] != config["distillation_head"]:
        raise UserError("Bi-ViT's DeiT has a distillation token only with its head; use another format")
    check_epsilon("Bi-ViT's DeiT", timm.DEIT_NORM_EPSILON, config)


def recognise(raw: RawCheckpoint) -> bool:
    """Returns whether the names are those of Bi-ViT's code."""
    return _DEIT_SCALE in raw.state or _SWIN_SCALE in raw.state


def interpret(raw: RawCheckpoint) -> Interpretation:
    """Finds the model from the shapes of its arrays."""
    backbone = timm.interpret(raw)
    if backbone.model == "swin":
        return dataclasses.replace(backbone, model=SWIN)
    heads = {"num_heads": raw.shape(_DEIT_SCALE)[0]}
    assumed = tuple(text for text in backbone.assumed if not text.startswith("num_heads"))
    return dataclasses.replace(backbone, model=DEIT, settings=backbone.settings | heads, assumed=assumed)


def describe(config: Config, class_names: tuple[str, ...], p: Preprocessing) -> dict[str, Any]:
    """Returns a ``config.json`` like that of the backbone; the code itself has none."""
    backbone = {**config, "name": family(config["name"]).backbone}
    values = timm.describe(backbone, class_names, p)
    return values | {"architecture": f"{values['architecture']}_bivit"}


def constants(config: Config, names: Mapping[str, np.ndarray]) -> Arrays:
    """Returns the unused biases as zeros, though they may have any value."""
    found = naming(config)
    layers = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    biases = {f"{layer}.bias": len(names[f"{layer}.weight"]) for layer in layers}
    return {name: np.zeros(size, np.float32) for name, size in biases.items() if found.is_unused(name)}


FORMAT = Format(
    name=NAME,
    models=MODELS,
    check=check,
    naming=naming,
    recognise=recognise,
    interpret=interpret,
    describe=describe,
    writes_constants=True,
    own_constants=constants,
)
