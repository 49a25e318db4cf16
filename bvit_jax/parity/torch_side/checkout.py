"""The checkout of the PyTorch code: its settings, its configurations and its models."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from typing import Any

import torch
from torch import nn

from .errors import Refused, one_line

SWITCHES = (
    "avg_res3",
    "avg_res5",
    "replace_ln_bn",
    "disable_layerscale",
    "enable_cls_token",
    "some_fp",
)
SETTINGS = ("model", "model_type", "weight_bits", "input_bits", "nb_classes", *SWITCHES)
SIZES = (
    "image_size",
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "depths",
    "num_attention_heads",
    "intermediate_size",
    "reduction_ratio",
    "clip_val",
)
NOT_READ = {  # sizes that the code of a model type ignores
    "extra-res-pyramid": ("patch_size", "num_hidden_layers"),
    "extra-res": ("depths", "reduction_ratio"),
    "deit": ("depths", "reduction_ratio", "clip_val"),
}


class DropPath(nn.Module):
    """Stands in for timm's: drop-path rates are zero here."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def provide_timm() -> None:
    """Provides stand-ins for timm if it is missing or of a version without the modules that are needed."""
    try:
        from timm.models.layers import DropPath as _  # noqa: F401
    except ImportError:
        layers = types.ModuleType("timm.models.layers")
        layers.__dict__.update(
            trunc_normal_=nn.init.trunc_normal_,
            DropPath=DropPath,
            to_2tuple=lambda x: x if isinstance(x, tuple) else (x, x),
        )
        for name in ("timm", "timm.models"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["timm.models.layers"] = layers


def import_models(repo: str) -> types.ModuleType:
    """Returns the checkout's ``models`` module."""
    provide_timm()
    sys.path.insert(0, repo)
    try:
        return importlib.import_module("models")
    except ImportError as error:
        raise Refused(
            f"cannot import models.py of {repo}: {error}; is {sys.executable} the reference's Python?"
        ) from error
    except Exception as error:
        raise Refused(f"cannot import models.py of {repo}: {one_line(error)}") from error


def read_config(repo: str, name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of a directory of the checkout's ``configs``, overridden."""
    configs = os.path.join(repo, "configs")
    # Only the last part counts: a checkpoint may come from a machine with other paths.
    directory = os.path.basename(os.path.normpath(name))
    path = os.path.join(configs, directory, "config.json")
    try:
        with open(path) as file:
            values = dict(json.load(file))
    except OSError:
        known = ", ".join(sorted(os.listdir(configs)))
        raise Refused(f"the checkout has no configs/{directory}/config.json; it has {known}") from None
    except ValueError as error:
        raise Refused(f"cannot read {path}: {error}") from error
    for key, value in overrides.items():
        if key not in values and key not in SIZES:
            known = ", ".join(k for k in (*SETTINGS, *SIZES) if k in values or k in SETTINGS)
            raise Refused(f"--set {key}: config.json of {directory} has no such key; known: {known}")
        values[key] = value
    if not isinstance(values.get("image_size"), int):
        raise Refused(f"image_size of {path} is {values.get('image_size')!r}; expected a whole number")
    return values


def vit_config(values: dict[str, Any]) -> types.SimpleNamespace:
    """Returns what the models read from transformers' ViTConfig.

    The class itself is not used: transformers 5 refuses sizes per stage.
    """
    names = ("id2label", "label2id")
    values = {key: value for key, value in values.items() if key not in names}
    values.update(
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        chunk_size_feed_forward=0,
        use_return_dict=True,
        output_attentions=False,
        output_hidden_states=False,
    )
    return types.SimpleNamespace(**values)


def git_commit(repo: str) -> str | None:
    """Returns the commit of the checkout, with ``-dirty`` after it if files were changed."""
    if not os.path.exists(os.path.join(repo, ".git")):  # git would find one further up
        return None
    command = ["git", "-C", repo, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
