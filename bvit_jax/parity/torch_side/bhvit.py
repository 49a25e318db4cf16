"""BHViT's code, github.com/IMRL/BHViT, with what does not run, or only at 224 pixels, replaced."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .binaryvit import get_model
from .checkout import import_module, provide_timm, read_config
from .subject import Evaluated, Subject

MODEL_TYPE = "dbhvit"
SWITCHES = (
    "shift3",
    "shift5",
    "replace_ln_bn",
    "disable_layerscale",
    "enable_cls_token",
    "gsb",
    "recu",
    "some_fp",
)
SETTINGS = ("model", "model_type", "weight_bits", "input_bits", "nb_classes", *SWITCHES)
SIZES = (
    "image_size",
    "window_size",
    "hidden_size",
    "depths",
    "num_attention_heads",
    "intermediate_size",
    "num_hidden_layersA",
    "num_hidden_layersB",
    "clip_val",
)
IMAGE_SIZE, WINDOW_SIZE, STEM = 224, 7, 64  # constants of the code


class BHViT(Subject):
    """A model of ``models.get_model``: a directory of ``configs`` and switches."""

    settings_keys = SETTINGS

    def __init__(self, repo: str, settings: dict[str, Any], overrides: dict[str, Any]) -> None:
        super().__init__(repo, settings, overrides)
        self._spell()
        self.config = read_config(repo, self.settings["model"], self.overrides, SETTINGS, SIZES)
        self.window_size = int(self.config.get("window_size", WINDOW_SIZE))
        depths = self.config["depths"]
        self.config["num_hidden_layersA"], self.config["num_hidden_layersB"] = (
            sum(depths[:2]),
            sum(depths[2:]),
        )

    def _spell(self) -> None:
        """Takes the directory and the model type of ``scripts/run_BHViT.sh`` for those that there are."""
        directory = os.path.basename(os.path.normpath(self.settings["model"]))
        found = os.listdir(os.path.join(self.repo, "configs"))
        alike = [name for name in found if name.lower() == directory.lower()]
        directory = directory if directory in found or not alike else alike[0]
        spelt = {"model": directory, "model_type": MODEL_TYPE}
        if spelt["model_type"] != self.settings["model_type"] or directory not in self.settings["model"]:
            self.patches.append("script")
        self.settings.update(spelt)

    @property
    def image_size(self) -> int:
        return int(self.config["image_size"])

    def meta(self) -> dict[str, Any]:
        settings = self.settings
        keys = [key for key in SIZES if key in self.config and key not in ("image_size", "window_size")]
        return {
            "model_type": MODEL_TYPE,
            "base": settings["model"],
            "config": {key: self.config[key] for key in keys},
            "args": {"drop_path": 0.0, **{key: settings[key] for key in ("nb_classes", *SWITCHES)}},
            "weight_bits": settings["weight_bits"],
            "input_bits": settings["input_bits"],
            "num_classes": settings["nb_classes"],
            "image_size": self.image_size,
            "window_size": self.window_size,
            "loss_weights": {"kd": 1.0},
        }

    def build(self) -> nn.Module:
        if provide_timm():
            self.patches.append("timm")
        models = import_module(self.repo, "models")
        code = import_module(self.repo, "transformer.BHViT")
        self._patch_stem(code)
        if self.settings["gsb"]:
            self._patch_gsb(code)
        other = (self.image_size, self.window_size) != (IMAGE_SIZE, WINDOW_SIZE)
        if other:
            self._patch_grids(code)
        model = get_model(models, self.config, self.settings)
        if other:
            self._patch_windows(model)
        return model

    def _patch_stem(self, code: Any) -> None:
        """Makes the width of the stem that of the first stage."""
        width = self.config["hidden_size"][0]
        if width == STEM:
            return
        original = code.BHViTPatchEmbeddings

        class Stem(original):  # type: ignore[misc, valid-type]
            def __init__(self, config: Any) -> None:
                super().__init__(config, out_chans=width)
                self.norm = config.norm_layer(width, eps=config.layer_norm_eps)

        code.BHViTPatchEmbeddings = Stem
        self.patches.append("stem")

    def _patch_gsb(self, code: Any) -> None:
        """Makes the masks of the attention float64: float32 ones times a float64 scalar are rounded."""
        original = code.GSB_Attention

        class Attention64:
            @staticmethod
            def apply(*inputs: Any) -> Any:
                if inputs[0].dtype != torch.float64:
                    return original.apply(*inputs)
                cast = torch.Tensor.float
                torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
                try:
                    return original.apply(*inputs)
                finally:
                    torch.Tensor.float = cast  # type: ignore[method-assign]

        code.GSB_Attention = Attention64
        self.patches.append("gsb")

    def _patch_grids(self, code: Any) -> None:
        """Makes the grids of the downsampling layers follow the image size."""
        for name in ("PatchEmbed", "BinaryPatchEmbed"):
            original = getattr(code, name)
            setattr(code, name, self._scaled(original))
        self.patches.append("window")

    def _scaled(self, original: Any) -> Any:
        return lambda side, **sizes: original(side * self.image_size // IMAGE_SIZE, **sizes)

    def _patch_windows(self, model: Any) -> None:
        """Makes the windows, and the pooling of a token from each, of the size asked for."""
        size = self.window_size
        for module in model.modules():
            if hasattr(module, "windows_size"):
                module.windows_size = size
            if hasattr(module, "merge_avg"):
                module.window_size = size
                for pool in (module.merge_avg, module.merge_max):
                    pool.kernel_size = pool.stride = size
                    pool.padding = (size - 1) // 2

    @torch.no_grad()
    def separate(self, model: nn.Module) -> None:
        """Keeps the biases of the mixers off the kinks behind them.

        A sum of signs is often zero there; were the bias then the kink, rounding would choose the side.
        """
        for module in model.modules():
            for i in (1, 2, 3):
                conv, act = getattr(module, f"cov{i}", None), getattr(module, f"act{i}", None)
                if conv is not None and act is not None:
                    act.move1.add_(0.125 * (conv.bias == act.move1))

    def evaluate(self, model: Any, images: torch.Tensor) -> Evaluated:
        """Returns the inputs of all blocks and the output of the last as tokens."""
        encoder, hidden = model.vit.encoder, list[torch.Tensor]()
        blocks = [*encoder.layerA, *encoder.layerB]

        def keep(module: nn.Module, inputs: Any, *outputs: Any) -> None:
            hidden.append((outputs[0] if outputs else inputs)[0].flatten(2).transpose(1, 2))

        handles = [block.register_forward_pre_hook(keep) for block in blocks]
        handles.append(blocks[-1].register_forward_hook(keep))
        output = model(images, output_attentions=True, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        return Evaluated(output.logits, (*hidden,), output.attentions)
