"""Bi-ViT's code, github.com/YanjingLi0202/Bi-ViT, with what does not run replaced.

Zeros before a sign are frequent in these models, and the code computes its sums of signs with rounding, which
then decides the sign of a zero. Here such sums are exact, and scaled afterwards; gradients are the code's.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .checkout import DropPath, import_module, provide, to_2tuple
from .errors import Refused, one_line
from .subject import Evaluated, Heads, Subject, soft_cross_entropy

DEIT_KEYS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "distilled")
SWIN_KEYS = ("img_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "num_classes")
CASES = {  # the module, the class and the arguments of each kind of model
    "bivit_deit": ("bi_vision_transformer", "twobits_VisionTransformer", DEIT_KEYS),
    "deit_distilled": ("bi_vision_transformer", "VisionTransformer", DEIT_KEYS),
    "bivit_swin": ("bi_swin_transformer", "Bi_SwinTransformer", SWIN_KEYS),
    "swin": ("bi_swin_transformer", "SwinTransformer", SWIN_KEYS),
}
NAMES: dict[str, dict[str, Any]] = {  # the models that the code registers
    "bi_deit_tiny_patch16_224": {"case": "bivit_deit", "embed_dim": 192, "num_heads": 3},
    "bi_deit_small_patch16_224": {"case": "bivit_deit", "embed_dim": 384, "num_heads": 6},
    "bi_swin_tiny_patch4_window7_224": {"case": "bivit_swin"},
}
DEIT: dict[str, Any] = {"patch_size": 16, "depth": 12, "distilled": True}
SWIN: dict[str, Any] = {"patch_size": 4, "embed_dim": 96, "depths": [2, 2, 6, 2]} | {
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
}
MISSING = ("Binary_plus", "lsq_plus", "_quan_base_plus")  # imported whole, and nothing of them is used
DEIT_EPSILON = 1e-6


class BiViT(Subject):
    """A DeiT or Swin of the code, binary or real."""

    class_bias, classes_key = "head.bias", "num_classes"
    zeros_for_unused = False

    def __init__(self, repo: str, settings: dict[str, Any], overrides: dict[str, Any]) -> None:
        self.case = settings.get("case")
        if self.case not in CASES:
            raise Refused(f"the case is {self.case!r}; expected one of {', '.join(CASES)}")
        self.module, self.kind, self.settings_keys = CASES[self.case]
        super().__init__(repo, settings, overrides)
        for key in self.overrides:
            raise Refused(
                f"--set {key}: {self.kind} has no such argument; known: {', '.join(self.settings_keys)}"
            )

    @classmethod
    def from_args(cls, settings: dict[str, Any]) -> dict[str, Any]:
        name = settings["model"]
        if name not in NAMES:
            raise Refused(
                f"the model in the checkpoint's args is {name!r}; expected one of {', '.join(NAMES)}"
            )
        shared = {"img_size": settings["input_size"], "num_classes": settings["nb_classes"]}
        return {**(SWIN if "swin" in name else DEIT), **NAMES[name], **shared}

    @property
    def image_size(self) -> int:
        return int(self.settings["img_size"])

    @property
    def distilled(self) -> bool:
        return bool(self.settings.get("distilled"))

    def meta(self) -> dict[str, Any]:
        rates = {} if "distilled" in self.settings else {"drop_path_rate": 0.0}
        return {"case": self.case, "kwargs": {**self.settings, **rates}}

    def build(self) -> nn.Module:
        self._provide()
        quantisers = self._import("Bi_Quant")
        self._patch_sums(quantisers)
        self._import("bi_vision_transformer")
        module = self._import(self.module)
        if "distilled" in self.settings:
            norm = functools.partial(nn.LayerNorm, eps=DEIT_EPSILON)
            model: nn.Module = getattr(module, self.kind)(**self.settings, norm_layer=norm)
        else:
            model = getattr(module, self.kind)(**self.settings, drop_path_rate=0.0)
        self.patches.append("pretrained")  # the functions of the code load files that it has not
        _defined(model)
        return model

    def _import(self, name: str) -> types.ModuleType:
        """Returns a module of the checkout; bytes of zero in its file are left out."""
        path = os.path.join(self.repo, f"{name}.py")
        with open(path, "rb") as file:
            source = file.read()
        if b"\0" not in source:
            return import_module(self.repo, name)
        self.patches.append("zeros")
        module = types.ModuleType(name)
        module.__file__ = path
        try:
            exec(compile(source.replace(b"\0", b""), path, "exec"), module.__dict__)
        except Exception as error:
            raise Refused(f"cannot import {name}.py of {self.repo}: {one_line(error)}") from error
        sys.modules[name] = module
        return module

    def _provide(self) -> None:
        """Provides what the code imports of timm 0.4, and modules that the code has not."""
        for name in MISSING:
            if not os.path.exists(os.path.join(self.repo, f"{name}.py")):
                provide(name)
                self.patches.append(name)
        try:
            import timm.models.helpers
            import timm.models.registry  # noqa: F401
        except ImportError:
            self.patches.append("timm")
            provide("timm.data", IMAGENET_DEFAULT_MEAN=(0.0,) * 3, IMAGENET_DEFAULT_STD=(1.0,) * 3)
            provide("timm.models.helpers", load_pretrained=None)
            provide("timm.models.layers", Mlp=Mlp, PatchEmbed=PatchEmbed)
            provide("timm.models.layers.drop", DropPath=DropPath)
            provide("timm.models.layers.helpers", to_2tuple=to_2tuple)
            provide("timm.models.layers.weight_init", trunc_normal_=nn.init.trunc_normal_)
            provide("timm.models.resnet", resnet26d=None, resnet50d=None)
            provide("timm.models.registry", register_model=lambda function: function)

    def _patch_sums(self, quantisers: Any) -> None:
        """Gives the quantisers a function that they lack, and makes sums of signs exact."""
        base = import_module(self.repo, "_binary_base_plus")
        if not hasattr(quantisers, "grad_scale"):
            quantisers.grad_scale = base.grad_scale
            self.patches.append("grad_scale")
        noisy = quantisers.BiLinearBiReal.forward
        if getattr(noisy, "is_exact", False):
            return

        def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
            scale = layer.weight.abs().mean(dim=1)
            return with_gradient(functional.linear(x.sign(), layer.weight.sign()) * scale, noisy(layer, x))

        forward.is_exact = True  # type: ignore[attr-defined]
        quantisers.BiLinearBiReal.forward = forward
        quantisers.sign_pass = lambda x: Codes(with_gradient(x.sign(), x))
        quantisers.grad_scale = lambda x, scale: with_gradient(x, x * scale)
        self.patches.append("sums")

    @torch.no_grad()
    def separate(self, model: nn.Module) -> None:
        """Leaves the zero points, which the first batch moves, at zero, where training finds them."""
        for name, parameter in model.named_parameters():
            if name.endswith(".zero_point"):
                parameter.zero_()

    def takes_signs(self, module: nn.Module) -> bool:
        return type(module).__name__ == "BiLinearBiReal"

    def evaluate(self, model: nn.Module, images: torch.Tensor) -> Evaluated:
        return Evaluated(model(images))

    def heads(self, model: nn.Module, images: torch.Tensor) -> Heads:
        output = model(images)
        return output if isinstance(output, tuple) else (output,)

    def inputs(self, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {**super().inputs(batch, rng), "labels": rng.integers(self.num_classes, size=batch)}

    def loss(self, heads: Heads, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns half of each head's cross-entropy, with the label and with the teacher's top class."""
        teacher = targets["teacher_logits"]
        if len(heads) == 1:
            return soft_cross_entropy(heads[0], teacher)
        top = functional.cross_entropy(heads[1], teacher.argmax(dim=1))
        return 0.5 * functional.cross_entropy(heads[0], targets["labels"]) + 0.5 * top


@torch.no_grad()
def _defined(model: nn.Module) -> None:
    """Sets the scales of the quantisers, which the code leaves to what the memory held, to one."""
    for name, parameter in model.named_parameters():
        if name.endswith(".alpha"):
            parameter.fill_(1.0)


def with_gradient(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns exactly ``value``, with the gradient of ``x``, which is as large up to rounding."""
    return value.detach() + (x - x.detach())


class Codes:
    """Codes and their scale, multiplied in this order: first the codes, exactly, then the scales."""

    def __init__(self, values: torch.Tensor, scale: Any = 1.0) -> None:
        self.values, self.scale = values, scale

    def __sub__(self, zero_point: torch.Tensor) -> Codes:
        return Codes(self.values - zero_point, self.scale)

    def __mul__(self, scale: Any) -> Codes:
        return Codes(self.values, self.scale * scale)

    def transpose(self, first: int, second: int) -> Codes:
        return Codes(self.values.transpose(first, second), self.scale)

    def __matmul__(self, other: Codes) -> torch.Tensor:
        return (self.values @ other.values) * (self.scale * other.scale)

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [arg.values * arg.scale if isinstance(arg, cls) else arg for arg in args]
        return function(*args, **(kwargs or {}))


class Mlp(nn.Module):
    """Stands in for timm's."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Any = nn.GELU, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Stands in for timm's: patches as tokens, and a norm."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, norm_layer: Any
    ) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size,) * 2
        self.num_patches = self.grid_size[0] ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))
