"""Random weights that exercise a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .subject import Subject

FLAG = "init_state"  # of modules whose values start from the first batch, zero before it


def first_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters and buffers of the modules that have a flag, by name."""
    owners = [name.rpartition(".")[0] for name, _ in model.named_buffers() if name.endswith(f".{FLAG}")]
    owned = [(f"{owner}.{name}", array) for owner in owners for name, array in own_arrays(model, owner)]
    return dict(owned)


def own_arrays(model: nn.Module, owner: str) -> list[tuple[str, torch.Tensor]]:
    """Returns what a module sets in the first batch: all that it has but weights and biases."""
    module = model.get_submodule(owner)
    arrays = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, array) for name, array in arrays if name not in ("weight", "bias")]


@torch.no_grad()
def settle(model: nn.Module, dtype: str, rng: np.random.Generator | None) -> None:
    """Rounds what the first batch set to a dtype, moved at random first if there is a generator."""
    for name, array in first_values(model).items():
        kind = name.rpartition(".")[2]
        if rng is not None and kind == "alpha":
            array.mul_(torch.from_numpy(rng.uniform(0.75, 1.5, array.shape)))
        elif rng is not None and kind == "zero_point":
            array.add_(torch.from_numpy(0.5 * rng.standard_normal(array.shape)))
        array.copy_(array.to(getattr(torch, dtype)))


@torch.no_grad()
def randomise(subject: Subject, model: nn.Module, images: torch.Tensor, rng: np.random.Generator) -> None:
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
    subject.separate(model)
    quantisers = {name: array.clone() for name, array in first_values(model).items()}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    model(images)
    for name, array in first_values(model).items():  # what the pass set
        array.copy_(quantisers[name])
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
