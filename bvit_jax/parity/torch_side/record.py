"""What a model computes: outputs, gradients, statistics, and a trace of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

TRACED = 4093  # a prime: a step through an array that shares no factor with its channels


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
