"""DeiT and Swin in timm's names, which for DeiT are Facebook's, and Swin in Microsoft's.

A bare file states neither the number of heads nor the epsilon: the published models have 64 channels per
head, and an epsilon of 1e-6 in DeiT. Source: ``timm/models/{deit,swin_transformer}.py`` of
github.com/huggingface/pytorch-image-models and ``models/swin_transformer.py`` of
github.com/microsoft/Swin-Transformer.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from bvit_jax.config import IMAGENET_MEAN, IMAGENET_STD
from bvit_jax.errors import UserError
from bvit_jax.weights.formats.base import (
    ASSUMED_PREPROCESSING,
    Config,
    Format,
    Interpretation,
    check_epsilon,
    square_side,
)
from bvit_jax.weights.naming import MICROSOFT_SWIN, TIMM_DEIT, TIMM_SWIN, Naming
from bvit_jax.weights.preprocessing import Preprocessing, deit_preprocessing
from bvit_jax.weights.raw_checkpoint import RawCheckpoint

NAME = "timm"
MICROSOFT = "microsoft"
MODELS = ("deit", "swin")
MICROSOFT_MODELS = ("swin",)

HEAD_SIZE = 64
DEIT_NORM_EPSILON = 1e-6
SWIN_NORM_EPSILON = 1e-5
CROP_PCT = 0.9  # timm's default for these models

_MODEL_ARGS = {
    *("img_size", "patch_size", "embed_dim", "depth", "depths", "num_heads", "mlp_ratio", "window_size"),
    *("num_classes", "drop_rate", "drop_path_rate"),
}
_FAMILIES = {  # (width, depth) -> timm's name of the size
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}


def naming(config: Config) -> Naming:
    """Returns timm's names of the arrays of a model of `MODELS`."""
    return TIMM_SWIN if config["name"] == "swin" else TIMM_DEIT


def check(config: Config) -> None:
    """Raises `UserError` if timm and Microsoft cannot compute this model of `MODELS`."""
    if config["name"] == "swin":
        check_epsilon("their Swin", SWIN_NORM_EPSILON, config)
        return
    if config["distillation_token"] != config["distillation_head"]:
        raise UserError("timm's DeiT has a distillation token only with its head; use another format")
    check_epsilon("timm's DeiT", DEIT_NORM_EPSILON, config)


def recognise(raw: RawCheckpoint) -> bool:
    """Returns whether the names are timm's, or Facebook's."""
    deit = "blocks.0.attn.qkv.weight" in raw.state
    return deit or (_is_swin(raw) and "head.fc.weight" in raw.state)


def recognise_microsoft(raw: RawCheckpoint) -> bool:
    """Returns whether the names are those of Microsoft's Swin."""
    return _is_swin(raw) and "head.fc.weight" not in raw.state


def interpret(raw: RawCheckpoint) -> Interpretation:
    """Finds the model from the shapes of its arrays, and from ``config.json`` where these leave it open."""
    _check_architecture(raw)
    settings, assumed = _swin_settings(raw) if _is_swin(raw) else _deit_settings(raw)
    settings["patch_size"] = raw.shape("patch_embed.proj.weight")[-1]
    if _is_swin(raw):
        size = _swin_image_size(raw, settings)
        # The smallest size whose last stage has a whole window: 224 for windows of 7, 384 for 12.
        whole = settings["patch_size"] * settings["window_size"] * 2 ** (len(settings["depth"]) - 1)
        settings["image_size"] = size or whole
        if size is None:
            assumed.append(f"image_size {whole}")
    else:
        tokens = raw.shape("pos_embed")[1] - 1 - settings["distillation_token"]
        settings["image_size"] = square_side(tokens, raw.origin) * settings["patch_size"]
    if not _pretrained_cfg(raw):
        assumed.append(ASSUMED_PREPROCESSING)
    model = "swin" if _is_swin(raw) else "deit"
    names = tuple(map(str, raw.values.get("label_names", ())))
    preprocessing = _preprocessing(raw, settings["image_size"])
    return Interpretation(model, settings, preprocessing, names, tuple(assumed))


def _check_architecture(raw: RawCheckpoint) -> None:
    """Raises `UserError` if ``config.json`` asks for something that our models cannot do."""
    name = raw.values.get("architecture", "deit_")
    plain = name.startswith(("deit_", "vit_", "swin_")) and not re.search("clip|gelu|rms", name)
    others = _args(raw).keys() - _MODEL_ARGS
    if not plain or others:
        what = f"architecture {name!r}" if not plain else f"model_args {', '.join(sorted(others))}"
        raise UserError(f"{raw.origin}: its config.json has {what}; expected a plain DeiT, ViT or Swin")
    pooling = "avg" if _is_swin(raw) else "token"
    if raw.values.get("global_pool", pooling) != pooling:
        raise UserError(f"{raw.origin}: global_pool is {raw.values['global_pool']!r}, expected {pooling!r}")


def _swin_image_size(raw: RawCheckpoint, settings: Mapping[str, Any]) -> int | None:
    """Returns the size that ``config.json`` states, or that the number of masks, one per window, implies."""
    if "input_size" in _pretrained_cfg(raw):
        return int(_pretrained_cfg(raw)["input_size"][-1])
    mask = raw.state.get("layers.0.blocks.1.attn_mask")
    if mask is None:
        return None
    side = math.isqrt(len(mask)) * settings["window_size"]
    return side * settings["patch_size"]


def describe(config: Config, class_names: tuple[str, ...], p: Preprocessing) -> dict[str, Any]:
    """Returns a ``config.json`` like those of timm's directories on the hub."""
    size = config["image_size"]
    values: dict[str, Any] = {
        "architecture": _architecture(config),
        "num_classes": config["num_classes"],
        "label_names": list(class_names),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": p.interpolation,
            "crop_pct": p.crop / p.resize,
            "crop_mode": "squash" if p.square else "center",
            "mean": list(p.mean),
            "std": list(p.std),
            "num_classes": config["num_classes"],
        },
    }
    sizes = {"img_size": size, "patch_size": config["patch_size"], "embed_dim": config["width"]}
    depth, heads = config["depth"], config["num_heads"]
    if config["name"] == "swin":
        sizes |= {"depths": list(depth), "num_heads": list(heads), "window_size": config["window_size"]}
        sizes |= {"mlp_ratio": config["mlp_ratio"]}
    else:
        sizes |= {"depth": depth, "num_heads": heads, "mlp_ratio": config["mlp_dim"] / config["width"]}
    return values | {"model_args": sizes}


def _is_swin(raw: RawCheckpoint) -> bool:
    return "layers.0.blocks.0.attn.qkv.weight" in raw.state


def _deit_settings(raw: RawCheckpoint) -> tuple[dict[str, Any], list[str]]:
    width = raw.shape("cls_token")[-1]
    two_heads = "head_dist.weight" in raw.state
    num_heads = _args(raw).get("num_heads", max(width // HEAD_SIZE, 1))
    assumed = [] if "num_heads" in _args(raw) else [f"num_heads {num_heads} ({HEAD_SIZE} channels each)"]
    assumed.append(f"norm_epsilon {DEIT_NORM_EPSILON}")
    settings = {
        "width": width,
        "depth": raw.count("blocks."),
        "num_heads": num_heads,
        "mlp_dim": raw.shape("blocks.0.mlp.fc1.weight")[0],
        "num_classes": raw.shape("head.weight")[0],
        "norm_epsilon": DEIT_NORM_EPSILON,
        "distillation_token": "dist_token" in raw.state,
        "distillation_head": two_heads,
    }
    return settings, assumed


def _swin_settings(raw: RawCheckpoint) -> tuple[dict[str, Any], list[str]]:
    tables = [
        raw.shape(f"layers.{i}.blocks.0.attn.relative_position_bias_table")
        for i in range(raw.count("layers."))
    ]
    width = raw.shape("patch_embed.proj.weight")[0]
    classifier = "head.fc.weight" if "head.fc.weight" in raw.state else "head.weight"
    settings = {
        "width": width,
        "depth": tuple(raw.count(f"layers.{i}.blocks.") for i in range(len(tables))),
        "num_heads": tuple(heads for _, heads in tables),
        # The window of the last stage may be cut to its grid; that of the first is the setting.
        "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
        "mlp_ratio": raw.shape("layers.0.blocks.0.mlp.fc1.weight")[0] // width,
        "num_classes": raw.shape(classifier)[0],
        "norm_epsilon": SWIN_NORM_EPSILON,
    }
    return settings, [f"norm_epsilon {SWIN_NORM_EPSILON}"]


def _args(raw: RawCheckpoint) -> Mapping[str, Any]:
    return dict(raw.values.get("model_args", {}))


def _pretrained_cfg(raw: RawCheckpoint) -> Mapping[str, Any]:
    if "pretrained_cfg" in raw.values:
        return dict(raw.values["pretrained_cfg"])
    return raw.values if "crop_pct" in raw.values else {}  # as timm wrote them at first


def _preprocessing(raw: RawCheckpoint, image_size: int) -> Preprocessing:
    described = _pretrained_cfg(raw)
    if not described:
        return deit_preprocessing(image_size)
    try:
        crop_pct = float(described.get("crop_pct", CROP_PCT))
        filter_name = described.get("interpolation", "bicubic")
        mean = tuple(map(float, described.get("mean", IMAGENET_MEAN)))
        std = tuple(map(float, described.get("std", IMAGENET_STD)))
        mode = described.get("crop_mode", "center")
        if mode not in ("center", "squash"):
            raise ValueError(f"crop_mode is {mode!r}, expected center or squash")
        # Rounded before it is cut: 224 / (224 / 256) is not always 256 in floating point.
        resize = math.floor(round(image_size / crop_pct, 6))
        return Preprocessing(resize, image_size, filter_name, mean, std, square=mode == "squash")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{raw.origin}: its pretrained_cfg is not understood: {error}") from error


def _architecture(config: Config) -> str:
    family = _FAMILIES.get((config["width"], config["depth"]), "tiny")
    patch, size = config["patch_size"], config["image_size"]
    if config["name"] == "swin":
        return f"swin_{family}_patch{patch}_window{config['window_size']}_{size}"
    distilled = "distilled_" if config["distillation_head"] else ""
    return f"deit_{family}_{distilled}patch{patch}_{size}"


FORMAT = Format(
    name=NAME,
    models=MODELS,
    check=check,
    naming=naming,
    recognise=recognise,
    interpret=interpret,
    describe=describe,
)
MICROSOFT_FORMAT = Format(
    name=MICROSOFT,
    models=MICROSOFT_MODELS,
    check=check,
    naming=lambda config: MICROSOFT_SWIN,
    recognise=recognise_microsoft,
    interpret=interpret,
    describe=describe,
    writes_constants=True,
)
