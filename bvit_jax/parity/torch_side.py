"""Runs the PyTorch reference on one batch and writes what it computes: the other side of ``parity dump``.

    python torch_side.py {describe,dump} REQUEST.json

A script for the reference's environment (Python 3.9, PyTorch 2.5 or later): it imports the standard
library, numpy, PyTorch and the checkout, and nothing of ours. ``describe`` prints the ``meta`` of the
file that ``dump`` would write. What is wrong with the request is one line on stderr and status 2.

The request has ``repo``, ``settings`` (the reference's arguments, or null for those of the
checkpoint), ``overrides`` of them and of its config.json, ``checkpoint`` (a file or null), ``images``
(an .npy file, (batch, 3, size, size), or null for random ones), ``batch``, ``seed``, ``compact`` and
``out``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import json
import os
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

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
NOT_READ = {  # by the code of a model type
    "extra-res-pyramid": ("patch_size", "num_hidden_layers"),
    "extra-res": ("depths", "reduction_ratio"),
    "deit": ("depths", "reduction_ratio", "clip_val"),
}
TRACED = 4093  # a prime: a step through an array that shares no factor with its channels
COMPACT = 4096  # elements from which a compact file stores an output in float32


class Refused(Exception):
    """The request cannot be met; the message is one line for the user."""


try:
    import numpy as np
    import torch
    from torch import nn
except ImportError as error:
    sys.stderr.write(
        f"error: {sys.executable} has no module {error.name!r}; "
        "install PyTorch and transformers there, or name another Python with --python\n"
    )
    sys.exit(2)


# --- the checkout ------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Stands in for timm's: drop-path rates are zero here."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def provide_timm() -> None:
    """Puts stand-ins in the place of timm where it is missing or has become another one."""
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
    # This script's directory, which Python puts first, must not shadow modules of the checkout.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [repo, *(path for path in sys.path if os.path.abspath(path) != here)]
    try:
        return importlib.import_module("models")
    except ImportError as error:
        raise Refused(
            f"cannot import models.py of {repo}: {error}; is {sys.executable} the reference's Python?"
        ) from error
    except Exception as error:
        raise Refused(f"cannot import models.py of {repo}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Returns the type and the first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


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


class Request:
    """One request with everything resolved: the checkpoint, the arguments, the configuration."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.repo: str = request["repo"]
        self.checkpoint: str | None = request["checkpoint"]
        self.images: str | None = request["images"]
        self.batch: int = request["batch"]
        self.seed: int = request["seed"]
        self.compact: bool = request["compact"]
        self.out: str = request["out"]
        overrides: dict[str, Any] = request["overrides"]
        self.state: dict[str, torch.Tensor] | None = None
        settings = request["settings"]
        if self.checkpoint is not None:
            self.state, args = read_checkpoint(self.checkpoint)
            if settings is None:
                settings = settings_of(args, self.checkpoint)
            elif "classifier.bias" in self.state:
                settings = {**settings, "nb_classes": len(self.state["classifier.bias"])}
        self.settings = {key: overrides.get(key, settings[key]) for key in SETTINGS}
        overrides = {key: value for key, value in overrides.items() if key not in SETTINGS}
        self.config = read_config(self.repo, self.settings["model"], overrides)

    def meta(self) -> dict[str, Any]:
        """Returns the ``meta`` of the golden file."""
        settings, model_type = self.settings, self.settings["model_type"]
        if model_type not in NOT_READ:
            raise Refused(f"the model type is {model_type!r}; expected one of {', '.join(NOT_READ)}")
        meta = {
            "model_type": model_type,
            "base": os.path.basename(os.path.normpath(settings["model"])),
            "config": {
                key: self.config[key]
                for key in SIZES
                if key in self.config and key not in NOT_READ[model_type]
            },
            "args": {"drop_path": 0.0, **{key: settings[key] for key in ("nb_classes", *SWITCHES)}},
            "weight_bits": settings["weight_bits"],
            "input_bits": settings["input_bits"],
            "num_classes": settings["nb_classes"],
            "weights_dtype": self.weights_dtype(),
            "seed": self.seed,
            "torch": torch.__version__,
        }
        if commit := git_commit(self.repo):
            meta["commit"] = commit
        if self.checkpoint is not None:
            meta["checkpoint"] = os.path.basename(self.checkpoint)
            meta["checkpoint_sha256"] = sha256(self.checkpoint)
        return meta

    def weights_dtype(self) -> str:
        """Returns the narrowest dtype that holds the weights and the images exactly."""
        if self.state is None:
            return "float16"
        wide = any(array.dtype == torch.float64 for array in self.state.values())
        return "float64" if wide else "float32"

    def model(self) -> nn.Module:
        """Returns the checkout's model in float64, with the checkpoint's weights or initial ones."""
        models = import_models(self.repo)
        config = vit_config(self.config)
        models.ViTConfig = types.SimpleNamespace(from_pretrained=lambda _: config)  # type: ignore[attr-defined]
        args = argparse.Namespace(**self.settings, drop_path=0.0)
        torch.manual_seed(self.seed)
        try:
            model = models.get_model(
                args, args.model, args.model_type, args.weight_bits, args.input_bits
            ).double()
        except Exception as error:
            raise Refused(f"the checkout cannot build the model: {one_line(error)}") from error
        if self.state is not None:
            load(model, self.state)
        return model


def git_commit(repo: str) -> str | None:
    """Returns the commit of the checkout, with ``-dirty`` after it if files were changed."""
    if not os.path.exists(os.path.join(repo, ".git")):  # git would find one further up
        return None
    command = ["git", "-C", repo, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --- the weights -------------------------------------------------------------------------------


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


def settings_of(args: Any, path: str) -> dict[str, Any]:
    """Returns the reference's arguments as a checkpoint holds them."""
    if args is None:
        raise Refused(f"{path} holds no 'args'; say with --model NAME which model it is")
    missing = [key for key in SETTINGS if not hasattr(args, key)]
    if missing:
        raise Refused(
            f"the 'args' of {path} have no {', '.join(missing)}; say with --model NAME which model it is"
        )
    return {key: getattr(args, key) for key in SETTINGS}


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


@torch.no_grad()
def randomise(model: nn.Module, images: torch.Tensor, rng: np.random.Generator) -> None:
    """Moves every parameter and running statistic off its initial value, to one that float16 holds.

    Running statistics are near those of the images: with others, the activations of a deep model drift
    until most signs are the same whatever the image, and a comparison sees little of the model.
    """

    def move(array: torch.Tensor, step: Any) -> None:
        array.add_(step * torch.from_numpy(np.asarray(rng.standard_normal(array.shape))))

    def scale(array: torch.Tensor) -> None:
        array.mul_(torch.from_numpy(np.asarray(rng.uniform(0.75, 1.5, array.shape))))

    def round_to_half(array: torch.Tensor) -> None:
        array.copy_(array.half().double())

    for parameter in model.parameters():
        if parameter.ndim == 0:  # the scale of attention probabilities stays positive
            scale(parameter)
        else:
            move(parameter, 0.02 if parameter.ndim > 1 else 0.1)
        round_to_half(parameter)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    model(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.zero_()
        move(mean, 0.1 * var.sqrt())
        scale(var)
        round_to_half(mean)
        round_to_half(var)


# --- what it computes --------------------------------------------------------------------------


def sample(array: torch.Tensor) -> np.ndarray:
    """Returns evenly spaced elements of an array, images laid out as (batch, height, width, channels)."""
    array = array.detach()
    flat = (array.permute(0, 2, 3, 1) if array.ndim == 4 else array).reshape(-1)
    count = min(TRACED, flat.numel())
    return flat[torch.arange(count) * flat.numel() // count].double().numpy()


def is_layer(module: nn.Module) -> bool:
    """Returns whether a module's output is part of the trace."""
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, kinds) or type(module).__name__ in ("RPReLU", "LayerScale")


class Recorder:
    """Records every layer's output and the signs that binary products see, in order of execution."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, np.ndarray] = {}
        self.signs: dict[str, torch.Tensor] = {}
        self.handles = []
        for name, module in model.named_modules():
            if is_layer(module):
                self.handles.append(module.register_forward_hook(self.output_hook(name)))
            if getattr(module, "input_bits", None) == 1:
                self.handles.append(module.register_forward_pre_hook(self.input_hook(name)))
            # Queries, keys and values are binarised after one more shift, outside of any module.
            if hasattr(module, "moveq2") and getattr(module, "act_quantizer", None) is not None:
                for unit in "qkv":
                    hook = self.shifted_hook(f"{name}.rprelu{unit}", getattr(module, f"move{unit}2"))
                    rprelu = getattr(module, f"rprelu{unit}")
                    self.handles.append(rprelu.register_forward_hook(hook))

    def output_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.outputs[name] = sample(output)

        return hook

    def input_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self.signs[name] = torch.sign(inputs[0].detach()).to(torch.int8)

        return hook

    def shifted_hook(self, name: str, move: torch.Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.signs[name] = torch.sign(output.detach() + move.detach()).to(torch.int8)

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def evaluate(model: nn.Module, images: torch.Tensor) -> tuple[Any, Recorder]:
    """Returns the model's output in evaluation mode and what its layers did."""
    model.eval()
    recorder = Recorder(model)
    with torch.no_grad():
        output = model(images, output_attentions=True, output_hidden_states=True)
    recorder.close()
    return output, recorder


def state_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: array.detach().numpy().copy() for name, array in model.state_dict().items()}


def run(model: nn.Module, images: np.ndarray, teacher_logits: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays of a golden file but ``meta``."""
    arrays = {f"state/{name}": array for name, array in state_arrays(model).items()}
    arrays["input/images"], arrays["input/teacher_logits"] = images, teacher_logits
    batch = torch.from_numpy(images)

    _, narrow = evaluate(copy.deepcopy(model).float(), batch.float())
    output, wide = evaluate(model, batch)
    arrays["eval/logits"] = output.logits.numpy()
    for name, values in (("hidden", output.hidden_states), ("attention", output.attentions)):
        arrays.update((f"eval/{name}/{i}", value.numpy()) for i, value in enumerate(values))
    arrays.update((f"trace/{name}", values) for name, values in wide.outputs.items())
    for name, signs in wide.signs.items():
        arrays[f"flips/{name}"] = (signs != narrow.signs[name]).double().mean().numpy()

    model.train()
    batch.requires_grad_(True)
    logits = model(batch).logits
    soft_labels = torch.from_numpy(teacher_logits).softmax(dim=1)
    loss = -(soft_labels * logits.log_softmax(dim=1)).sum(dim=1).mean()
    loss.backward()
    arrays["train/logits"], arrays["train/loss"] = logits.detach().numpy(), loss.detach().numpy()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        arrays[f"grad/{name}"] = gradient.numpy()
    arrays["grad_input/images"] = np.asarray(batch.grad)
    buffers = dict(model.named_buffers())
    arrays.update((f"train_state/{name}", buffer.numpy()) for name, buffer in buffers.items())
    return arrays


def compact(arrays: dict[str, np.ndarray], weights_dtype: str) -> dict[str, np.ndarray]:
    """Returns the arrays in the dtypes of the smallest file that is still checked in float64."""

    def narrow(name: str, array: np.ndarray) -> np.ndarray:
        if array.dtype != np.float64:
            return array
        if name.startswith(("state/", "input/")):
            return array.astype(weights_dtype)
        return array.astype(np.float32) if array.size > COMPACT else array

    return {name: narrow(name, array) for name, array in arrays.items()}


def dump(request: Request) -> None:
    meta, model = request.meta(), request.model()
    dtype, rng = meta["weights_dtype"], np.random.default_rng((request.seed, 1))
    if request.images is not None:
        images = np.load(request.images)
    else:
        size = request.config["image_size"]
        images = rng.standard_normal((request.batch, 3, size, size))
    # Rounded, because the weights' dtype is the one in which a model must be able to load them.
    images = images.astype("float16" if dtype == "float16" else "float32").astype(np.float64)
    classes = request.settings["nb_classes"]
    teacher_logits = rng.standard_normal((len(images), classes)).astype(np.float16).astype(np.float64)
    try:
        if request.state is None:
            randomise(model, torch.from_numpy(images), np.random.default_rng(request.seed))
        arrays = run(model, images, teacher_logits)
    except Exception as error:
        raise Refused(f"the checkout cannot run the model: {one_line(error)}") from error
    if request.compact:
        arrays = compact(arrays, dtype)
    save = np.savez_compressed if request.compact else np.savez
    with open(request.out, "wb") as file:
        save(file, meta=np.array(json.dumps(meta)), **arrays)  # type: ignore[arg-type]


def main() -> int:
    command, path = sys.argv[1:]
    try:
        with open(path) as file:
            request = Request(json.load(file))
        if command == "describe":
            sys.stdout.write(json.dumps(request.meta()))
        else:
            with redirect_stdout(sys.stderr):  # the reference prints as it builds
                dump(request)
    except Refused as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
