"""Checkpoints of Bi-ViT's released code: the names of its backbones, and those of its quantisers.

The linear layers of a block have a bias that the code creates and never adds. It says nothing about the
function and is kept with the other such arrays for the way back.

Source: the behaviour of github.com/YanjingLi0202/Bi-ViT.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bvit_jax.errors import UserError
from bvit_jax.models import family
from bvit_jax.weights.formats import timm
from bvit_jax.weights.formats.base import Preprocessing, RawCheckpoint, Understood, check_epsilon
from bvit_jax.weights.formats.swin_constants import window_constants
from bvit_jax.weights.names import BIVIT_DEIT, BIVIT_SWIN, Naming

NAME = "bivit"
SWIN, DEIT = "bivit_release_swin", "bivit_release_deit"
MODELS = (DEIT, SWIN)

_DEIT_SCALE = "blocks.0.attn.q_act.alpha"
_SWIN_SCALE = "layers.0.blocks.0.attn.q_act.alpha"


def naming(config: Mapping[str, Any]) -> Naming:
    """Returns the names of the arrays of a model of `MODELS`."""
    return BIVIT_SWIN if config["name"] == SWIN else BIVIT_DEIT


def check(config: Mapping[str, Any]) -> None:
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


def understand(raw: RawCheckpoint) -> Understood:
    """Finds the model from the shapes of its arrays."""
    backbone = timm.understand(raw)
    if backbone.model == "swin":
        return dataclasses.replace(backbone, model=SWIN)
    heads = {"num_heads": raw.shape(_DEIT_SCALE)[0]}
    assumed = tuple(text for text in backbone.assumed if not text.startswith("num_heads"))
    return dataclasses.replace(backbone, model=DEIT, settings=backbone.settings | heads, assumed=assumed)


def describe(config: Mapping[str, Any], class_names: tuple[str, ...], p: Preprocessing) -> dict[str, Any]:
    """Returns a ``config.json`` like that of the backbone; the code itself has none."""
    values = timm.describe(_backbone(config), class_names, p)
    return values | {"architecture": f"{values['architecture']}_bivit"}


def constants(config: Mapping[str, Any], names: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the unused biases as zeros, though they may have any value, and a Swin's windows."""
    found = naming(config)
    layers = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    biases = {f"{layer}.bias": len(names[f"{layer}.weight"]) for layer in layers}
    unused = {name: np.zeros(size, np.float32) for name, size in biases.items() if found.is_unused(name)}
    return unused | window_constants(_backbone(config), found)


def _backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in config} | {"name": family(config["name"]).backbone}
