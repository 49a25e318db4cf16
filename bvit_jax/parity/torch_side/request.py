"""One request: which model with which weights on which images, and the golden file of it."""

from __future__ import annotations

import argparse
import json
import os
import types
from typing import Any

import numpy as np
import torch
from torch import nn

from .checkout import NOT_READ, SETTINGS, SIZES, SWITCHES, git_commit, import_models, read_config, vit_config
from .checkpoint import load, read_checkpoint, settings_of, sha256
from .errors import Refused, one_line
from .record import run

COMPACT = 4096  # elements from which a compact file stores an output in float32


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
        """Returns the narrowest dtype that holds weights and images exactly."""
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


@torch.no_grad()
def randomise(model: nn.Module, images: torch.Tensor, rng: np.random.Generator) -> None:
    """Moves every parameter and running statistic away from its initial value, to one that float16 holds.

    Running statistics stay near those of the images. Otherwise the activations of a deep model drift until
    most signs no longer depend on the image, and a comparison would test little of the model.
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
