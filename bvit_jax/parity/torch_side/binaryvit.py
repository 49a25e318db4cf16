"""BinaryViT's code, github.com/Phuoc-Hoan-Le/BinaryViT."""

from __future__ import annotations

import argparse
import os
import types
from typing import Any

from torch import nn

from .checkout import import_module, provide_timm, read_config, vit_config
from .errors import Refused
from .subject import Subject

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


class BinaryViT(Subject):
    """A model of ``models.get_model``: a directory of ``configs``, a model type and switches."""

    settings_keys = SETTINGS

    def __init__(self, repo: str, settings: dict[str, Any], overrides: dict[str, Any]) -> None:
        super().__init__(repo, settings, overrides)
        self.config = read_config(repo, self.settings["model"], self.overrides, SETTINGS, SIZES)

    @property
    def image_size(self) -> int:
        return int(self.config["image_size"])

    def meta(self) -> dict[str, Any]:
        settings, model_type = self.settings, self.settings["model_type"]
        if model_type not in NOT_READ:
            raise Refused(f"the model type is {model_type!r}; expected one of {', '.join(NOT_READ)}")
        return {
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
        }

    def build(self) -> nn.Module:
        provide_timm()
        return get_model(import_module(self.repo, "models"), self.config, self.settings)


def get_model(models: Any, config: dict[str, Any], settings: dict[str, Any]) -> nn.Module:
    """Returns what the ``get_model`` of a checkout builds from its configuration and arguments."""
    values = vit_config(config)
    models.ViTConfig = types.SimpleNamespace(from_pretrained=lambda _: values)
    args = argparse.Namespace(**settings, drop_path=0.0)
    model: nn.Module = models.get_model(args, args.model, args.model_type, args.weight_bits, args.input_bits)
    return model
