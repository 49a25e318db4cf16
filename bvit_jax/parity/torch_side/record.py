"""What a model computes: outputs, gradients, statistics, and a trace of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from .randomise import FLAG, first_values, settle
from .subject import Evaluated, Subject

TRACED = 4093  # a prime: a step through an array that shares no factor with its channels
# Buffers that training does not change after the first batch.
CONSTANTS = (FLAG, "signed", "relative_position_index", "attn_mask")


def sample(array: torch.Tensor) -> np.ndarray:
    """Returns evenly spaced elements of an array."""
    flat = array.detach().reshape(-1)
    count = min(TRACED, flat.numel())
    return flat[torch.arange(count) * flat.numel() // count].double().numpy()


def is_layer(module: nn.Module) -> bool:
    """Returns whether a module's output is part of the trace."""
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, kinds) or type(module).__name__ in ("RPReLU", "LayerScale")


def channels_last(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """Returns images as (batch, height, width, channels), and heads as (batch, tokens, heads, channels)."""
    if output.ndim != 4:
        return output
    return output.permute(0, 2, 3, 1) if isinstance(module, nn.Conv2d) else output.transpose(1, 2)


class Recorder:
    """Records every layer's output and the signs that binary products see, in order of execution."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        self.outputs: dict[str, np.ndarray] = {}
        self.signs: dict[str, torch.Tensor] = {}
        self.handles = []
        for name, module in model.named_modules():
            if is_layer(module):
                self.handles.append(module.register_forward_hook(self.output_hook(name)))
            if subject.takes_signs(module):
                self.handles.append(module.register_forward_pre_hook(self.input_hook(name)))
            # Queries, keys and values are binarised after one more shift, outside of any module.
            if hasattr(module, "moveq2") and getattr(module, "act_quantizer", None) is not None:
                for unit in "qkv":
                    hook = self.shifted_hook(f"{name}.rprelu{unit}", getattr(module, f"move{unit}2"))
                    rprelu = getattr(module, f"rprelu{unit}")
                    self.handles.append(rprelu.register_forward_hook(hook))

    def output_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.outputs[name] = sample(channels_last(module, output))

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


def evaluate(subject: Subject, model: nn.Module, images: torch.Tensor) -> tuple[Evaluated, Recorder]:
    """Returns the model's output in evaluation mode and what its layers did."""
    model.eval()
    recorder = Recorder(subject, model)
    with torch.no_grad():
        output = subject.evaluate(model, images)
    recorder.close()
    return output, recorder


def state_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: array.detach().numpy().copy() for name, array in model.state_dict().items()}


def run(
    subject: Subject,
    model: nn.Module,
    inputs: dict[str, np.ndarray],
    weights_dtype: str,
    rng: np.random.Generator | None,
) -> dict[str, np.ndarray]:
    """Returns the arrays of a golden file but ``meta``.

    ``rng`` moves what the first batch sets, for random weights; those of a checkpoint have None.
    """
    arrays = {f"state/{name}": array for name, array in state_arrays(model).items()}
    arrays.update((f"input/{name}", array) for name, array in inputs.items())
    targets = {name: torch.from_numpy(array) for name, array in inputs.items()}
    images = targets.pop("images")
    arrays.update(first_batch(subject, model, images, weights_dtype, rng))
    arrays.update(evaluated(subject, model, images))
    arrays.update(trained(subject, model, images, targets))
    return arrays


def first_batch(
    subject: Subject,
    model: nn.Module,
    images: torch.Tensor,
    weights_dtype: str,
    rng: np.random.Generator | None,
) -> dict[str, np.ndarray]:
    """Returns what the first batch of training computes and sets, if the model waits for it.

    Afterwards the model has the values of ``state2/*``.
    """
    flags = [array for name, array in first_values(model).items() if name.endswith(FLAG)]
    if all(flag.item() for flag in flags):
        return {}
    before = state_arrays(model)
    arrays = {"init/eval_logits": evaluate(subject, model, images)[0].logits.numpy()}
    with torch.no_grad():
        arrays["init/logits"] = subject.heads(model.train(), images)[0].numpy()
    counted = ".num_batches_tracked"
    changed = {
        name: array
        for name, array in state_arrays(model).items()
        if not np.array_equal(array, before[name]) and not name.endswith(counted)
    }
    arrays.update((f"init_state/{name}", array) for name, array in changed.items())
    settle(model, weights_dtype, rng)
    settled = set(first_values(model))
    model.load_state_dict(
        {name: torch.from_numpy(array) for name, array in before.items() if name not in settled}, strict=False
    )
    now = state_arrays(model)
    arrays.update((f"state2/{name}", now[name]) for name in changed)
    return arrays


def evaluated(subject: Subject, model: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Returns outputs, trace and flips of evaluation mode."""
    _, narrow = evaluate(subject, copy.deepcopy(model).float(), images.float())
    output, wide = evaluate(subject, model, images)
    arrays = {"eval/logits": output.logits.numpy()}
    for name, values in (("hidden", output.hidden), ("attention", output.attentions)):
        arrays.update((f"eval/{name}/{i}", value.numpy()) for i, value in enumerate(values))
    arrays.update((f"trace/{name}", values) for name, values in wide.outputs.items())
    for name, signs in wide.signs.items():
        arrays[f"flips/{name}"] = (signs != narrow.signs[name]).double().mean().numpy()
    return arrays


def trained(
    subject: Subject, model: nn.Module, images: torch.Tensor, targets: dict[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """Returns the loss of one batch in training mode, its gradients and the statistics after it."""
    model.train()
    images.requires_grad_(True)
    heads = subject.heads(model, images)
    loss = subject.loss(heads, targets)
    loss.backward()
    logits = subject.logits_arrays(heads)
    arrays = {f"train/{name}": array.detach().numpy() for name, array in logits.items()}
    arrays["train/loss"] = loss.detach().numpy()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            arrays[f"grad/{name}"] = parameter.grad.numpy()
        elif subject.zeros_for_unused:
            arrays[f"grad/{name}"] = torch.zeros_like(parameter).numpy()
    arrays["grad_input/images"] = np.asarray(images.grad)
    buffers = {n: a for n, a in model.named_buffers() if n.rpartition(".")[2] not in CONSTANTS}
    arrays.update((f"train_state/{name}", buffer.numpy()) for name, buffer in buffers.items())
    return arrays
