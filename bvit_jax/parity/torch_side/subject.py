"""What the program needs to know of one code: a subclass of `Subject` in a file of the code's name."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

Heads = tuple[torch.Tensor, ...]


class Evaluated(NamedTuple):
    """What a model computes in evaluation mode; hidden states and attentions may be left out."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()
    attentions: tuple[torch.Tensor, ...] = ()


class Subject:
    """One model of one code.

    Attributes:
      patches: names of what was replaced in the code so that it runs, of which none changes its arithmetic.
    """

    settings_keys: tuple[str, ...] = ()  # what a request's settings and a checkpoint's args hold
    class_bias = "classifier.bias"  # its length is the number of classes
    classes_key = "nb_classes"
    zeros_for_unused = True  # whether a parameter without a gradient has one of zeros in the file

    def __init__(self, repo: str, settings: dict[str, Any], overrides: dict[str, Any]) -> None:
        self.repo, self.patches = repo, list[str]()
        self.settings = {key: overrides.get(key, settings[key]) for key in self.settings_keys}
        self.overrides = {key: value for key, value in overrides.items() if key not in self.settings_keys}

    @classmethod
    def from_args(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Returns the settings for the arguments in a checkpoint."""
        return settings

    @property
    def image_size(self) -> int:
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        return int(self.settings[self.classes_key])

    def meta(self) -> dict[str, Any]:
        """Returns what the ``meta`` of a golden file says about the model."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """Returns the checkout's model with initial weights."""
        raise NotImplementedError

    def separate(self, model: nn.Module) -> None:
        """Moves random weights off the values at which rounding would decide what is computed."""

    def takes_signs(self, module: nn.Module) -> bool:
        """Returns whether a module is a binary product, which takes the signs of its input."""
        return getattr(module, "input_bits", None) == 1

    def evaluate(self, model: nn.Module, images: torch.Tensor) -> Evaluated:
        output = model(images, output_attentions=True, output_hidden_states=True)
        return Evaluated(output.logits, output.hidden_states, output.attentions)

    def heads(self, model: nn.Module, images: torch.Tensor) -> Heads:
        """Returns the logits of each head, in training mode."""
        return (model(images).logits,)

    def inputs(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the random targets of a batch."""
        shape = (batch, self.num_classes)
        return {"teacher_logits": rng.standard_normal(shape).astype(np.float16).astype(np.float64)}

    def loss(self, heads: Heads, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return soft_cross_entropy(heads[0], targets["teacher_logits"])

    def logits_arrays(self, heads: Heads) -> dict[str, torch.Tensor]:
        """Returns the logits by their names in a file."""
        if len(heads) == 1:
            return {"logits": heads[0]}
        return {f"logits/{i}": head for i, head in enumerate(heads)}


def soft_cross_entropy(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy with the probabilities of a teacher."""
    return -(teacher.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()
