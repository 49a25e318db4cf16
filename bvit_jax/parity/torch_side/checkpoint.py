"""Checkpoints of the PyTorch code: weights and training arguments, read without running their code."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from typing import Any

import torch
from torch import nn

from .errors import Refused, one_line


def sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Returns the state dict of a .pth file and the training arguments in it, or None.

    Nothing in the file is executed: tensors, plain containers and `argparse.Namespace` are all that
    is unpickled.
    """
    if not hasattr(torch.serialization, "safe_globals"):
        raise Refused(f"PyTorch {torch.__version__} cannot read checkpoints safely; use 2.5 or later")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise Refused(
                f"{path} holds a {found.group(1)}, which could run code; "
                "expected tensors, plain containers and argparse.Namespace only"
            ) from error
        raise Refused(f"cannot read {path}: {unreadable(error)}") from error
    except Exception as error:  # whatever PyTorch, zipfile and pickle raise for damaged files
        raise Refused(f"cannot read {path}: {unreadable(error)}") from error
    state, args = content, None
    if isinstance(content, dict) and "model" in content:
        state, args = content["model"], content.get("args")
    tensors = isinstance(state, dict) and all(isinstance(a, torch.Tensor) for a in state.values())
    if not tensors or not state:
        raise Refused(f"{path} holds no state dict; expected one, or a dict with one under 'model'")
    return state, args


def unreadable(error: BaseException) -> str:
    return f"{one_line(error)}; expected a .pth file of PyTorch, is it complete?"


def settings_of(args: Any, path: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Returns the code's arguments of these names as a checkpoint holds them."""
    if args is None:
        raise Refused(f"{path} holds no 'args'; say with --model NAME which model it is")
    missing = [key for key in keys if not hasattr(args, key)]
    if missing:
        raise Refused(
            f"the 'args' of {path} have no {', '.join(missing)}; say with --model NAME which model it is"
        )
    return {key: getattr(args, key) for key in keys}


def load(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Loads a state dict, whose arrays must be those of the model."""
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    for names, where in (
        (missing, "model are not in the checkpoint"),
        (unexpected, "checkpoint are unknown"),
    ):
        if names:
            raise Refused(f"{len(names)} arrays of the {where}, the first is {names[0]!r}: another model?")
    for name, array in expected.items():
        if state[name].shape != array.shape:
            raise Refused(
                f"{name!r} of the checkpoint has shape {tuple(state[name].shape)}; "
                f"the model expects {tuple(array.shape)}: another model?"
            )
    model.load_state_dict(state)
