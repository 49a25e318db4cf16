"""A checkout of PyTorch code: its modules, what they miss, its configurations and its commit."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .errors import Refused, one_line


class DropPath(nn.Module):
    """Stands in for timm's: drop-path rates are zero here."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def to_2tuple(x: Any) -> Any:
    """Returns a pair of the value, or the value if it is one."""
    return x if isinstance(x, tuple) else (x, x)


def provide(name: str, **contents: Any) -> None:
    """Registers a module of that name, and the packages above it where they are missing."""
    parent, _, leaf = name.rpartition(".")
    if parent and parent not in sys.modules:
        provide(parent)
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], leaf, module)


def provide_timm() -> bool:
    """Provides stand-ins for timm's layers where it is missing or has none there; returns whether it did."""
    try:
        from timm.models.layers import DropPath as _  # noqa: F401
    except ImportError:
        functions = {"trunc_normal_": nn.init.trunc_normal_, "to_2tuple": to_2tuple}
        provide("timm.models.layers", DropPath=DropPath, **functions)
        return True
    return False


def import_module(repo: str, name: str) -> types.ModuleType:
    """Returns a module of the checkout."""
    if repo not in sys.path:
        sys.path.insert(0, repo)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(
            f"cannot import {name}.py of {repo}: {error}; is {sys.executable} the reference's Python?"
        ) from error
    except Exception as error:
        raise Refused(f"cannot import {name}.py of {repo}: {one_line(error)}") from error


def read_config(
    repo: str, name: str, overrides: dict[str, Any], settings: Collection[str], sizes: Collection[str]
) -> dict[str, Any]:
    """Returns the config.json of a directory of the checkout's ``configs``, overridden.

    ``sizes`` may be overridden even if the file has none; ``settings`` are the code's arguments, which the
    message about an unknown key names too.
    """
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
        if key not in values and key not in sizes:
            known = ", ".join(k for k in (*settings, *sizes) if k in values or k in settings)
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
