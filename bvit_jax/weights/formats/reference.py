"""Checkpoints of the BinaryViT code: ``.pth`` with ``model`` and ``args``, and its ``config.json``.

Source: ``main.py``, ``models.py`` and ``configs/`` of github.com/Phuoc-Hoan-Le/BinaryViT.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bvit_jax.errors import UserError
from bvit_jax.models.binaryvit import BinaryViT
from bvit_jax.weights.formats.base import (
    ASSUMED_PREPROCESSING,
    Arrays,
    Config,
    Format,
    Interpretation,
    check_epsilon,
    square_side,
)
from bvit_jax.weights.naming import REFERENCE, Naming
from bvit_jax.weights.preprocessing import Preprocessing, deit_preprocessing
from bvit_jax.weights.raw_checkpoint import RawCheckpoint

NAME = "reference"
MODELS = ("binaryvit", "react_deit", "deit")
MODEL_TYPES = {"extra-res-pyramid": "binaryvit", "extra-res": "react_deit", "deit": "deit"}
NORM_EPSILON = 1e-5  # set by the code, whatever its config.json says
HEAD_SIZE = 64
DEFAULT_CLIP_VAL = 2.5

_LAYER = "vit.encoder.layer."
_QUANTISED = (  # modules with quantised weights, also of BHViT's code
    r"\.attention\.(query|key|value|reduction)$|"
    r"\.layer[AB]?\.\d+\.(attention\.output|intermediate|output)\.dense$|"
    r"\.GC\.cov\d+$|"
    r"\.patch_embed\d+\.proj$"
)
_CONFIG_KEYS = {  # of its config.json -> of ours
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "reduction_ratio": "reduction",
    "clip_val": "clip_val",
}


def naming(config: Config) -> Naming:
    """Returns the names of the arrays of a model of `MODELS`."""
    del config
    return REFERENCE


def check(config: Config) -> None:
    """Raises `UserError` if the code cannot compute this model of `MODELS`."""
    if config.get("distillation_token"):
        raise UserError("the BinaryViT code's DeiT has no distillation token; use another format")
    check_epsilon("the BinaryViT code", NORM_EPSILON, config)


def recognise(raw: RawCheckpoint) -> bool:
    """Returns whether the names are those of the BinaryViT code."""
    return "vit.layernorm.weight" in raw.state


def interpret(raw: RawCheckpoint) -> Interpretation:
    """Finds the model from its arrays, and from its configuration where these leave something open."""
    blocks = _blocks(raw)
    model = _model_name(raw)
    settings: dict[str, Any] = {
        "num_classes": raw.shape("classifier.bias")[0],
        "patch_size": raw.shape("vit.embeddings.patch_embeddings.projection.weight")[-1],
        "norm_epsilon": NORM_EPSILON,
    }
    if "drop_path" in raw.args:
        settings["drop_path"] = float(raw.args["drop_path"])
    class_token = "vit.embeddings.cls_token" in raw.state
    tokens = raw.shape("vit.embeddings.position_embeddings")[1] - class_token
    settings["image_size"] = square_side(tokens, raw.origin) * settings["patch_size"]
    assumed = []
    if model == "binaryvit":
        settings |= _stages(blocks)
        assumed += _assume_reduction(raw, settings)
    else:
        settings |= {"width": blocks[0][0], "mlp_dim": blocks[0][1], "depth": len(blocks)}
        settings["num_heads"] = max(blocks[0][0] // HEAD_SIZE, 1)
    if model != "deit":
        settings |= _switches(raw, model)
        if "weight_bits" not in raw.args:
            assumed.append(f"weight_bits {settings['weight_bits']}")
    elif not raw.args:
        assumed.append(f"norm_epsilon {NORM_EPSILON}")
        if not raw.values:  # the code's or Hugging Face's, whose ViTs have other colours
            assumed.append(ASSUMED_PREPROCESSING)
    said = from_config_values(raw.values)
    if "num_heads" not in said:
        assumed.append(f"num_heads {settings['num_heads']} ({HEAD_SIZE} channels each)")
    settings |= {key: value for key, value in said.items() if key in settings}
    if "reduction" in said:
        assumed = [text for text in assumed if not text.startswith("reduction")]
    labels = labels_of(raw.values, settings["num_classes"])
    return Interpretation(model, settings, deit_preprocessing(settings["image_size"]), labels, tuple(assumed))


def from_config_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our settings for the keys of the code's ``config.json``, lists as tuples."""
    settings = {ours: values[theirs] for theirs, ours in _CONFIG_KEYS.items() if theirs in values}
    if "depths" in values or "num_hidden_layers" in values:
        settings["depth"] = values.get("depths", values.get("num_hidden_layers"))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def labels_of(values: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Returns the names in ``id2label``; none unless there is one for each class."""
    labels = values.get("id2label", {})
    if not isinstance(labels, Mapping) or len(labels) != num_classes:
        return ()
    by_index = {int(index): str(name) for index, name in labels.items() if str(index).isdecimal()}
    return tuple(by_index.get(i, f"class {i}") for i in range(num_classes))


def describe(config: Config, class_names: tuple[str, ...], _: Preprocessing) -> dict[str, Any]:
    """Returns the ``config.json`` from which the code builds a model of this configuration."""
    values: dict[str, Any] = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "attention_probs_dropout_prob": config["attention_dropout"],
        "hidden_dropout_prob": config["dropout"],
        "drop_path": config["drop_path"],
        "hidden_act": "gelu",
        "num_channels": 3,
        "qkv_bias": True,
        "layer_norm_eps": config["norm_epsilon"],
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "label2id": {name: i for i, name in enumerate(class_names)},
    }
    for theirs, ours in _CONFIG_KEYS.items():
        if ours in config:
            value = config[ours]
            values[theirs] = list(value) if isinstance(value, tuple) else value
    depth = config["depth"]
    if isinstance(depth, tuple):
        return values | {"depths": list(depth)}
    return values | {"num_hidden_layers": depth}


def constants(config: Config, names: Mapping[str, np.ndarray]) -> Arrays:
    """Returns the arrays other than parameters and statistics that the code's modules hold."""
    counters = {
        name.removesuffix("running_mean") + "num_batches_tracked": np.array(0, np.int64)
        for name in names
        if name.endswith(".running_mean")
    }
    if not 2 <= config.get("weight_bits", 1) <= 8:
        return counters
    limits = np.array([-config["clip_val"], config["clip_val"]], np.float32)
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    quantised = (module for module in modules if re.search(_QUANTISED, module))
    if config.get("some_fp"):
        quantised = (module for module in quantised if not module.endswith(".proj"))
    return counters | {f"{module}.weight_clip_val": limits for module in quantised}


def _model_name(raw: RawCheckpoint) -> str:
    if raw.args.get("model_type") in MODEL_TYPES:
        return MODEL_TYPES[raw.args["model_type"]]
    if "vit.encoder.patch_embed1.proj.weight" in raw.state or "vit.embeddings.norm.weight" in raw.state:
        return "binaryvit"
    return "react_deit" if f"{_LAYER}0.attention.attention.moveq" in raw.state else "deit"


def _blocks(raw: RawCheckpoint) -> list[tuple[int, int, bool]]:
    """Returns width, feed-forward width and whether keys are pooled, of each block."""
    return [
        (
            raw.shape(f"{_LAYER}{i}.layernorm_before.weight")[0],
            raw.shape(f"{_LAYER}{i}.intermediate.dense.weight")[0],
            f"{_LAYER}{i}.attention.attention.reduction.weight" in raw.state,
        )
        for i in range(max(raw.count(_LAYER), 1))
    ]


def _stages(blocks: list[tuple[int, int, bool]]) -> dict[str, Any]:
    stages = [(key, len(list(group))) for key, group in itertools.groupby(blocks)]
    return {
        "width": tuple(width for (width, _, _), _ in stages),
        "mlp_dim": tuple(mlp_dim for (_, mlp_dim, _), _ in stages),
        "depth": tuple(depth for _, depth in stages),
        "num_heads": tuple(max(width // HEAD_SIZE, 1) for (width, _, _), _ in stages),
        "reduction": tuple(
            BinaryViT.reduction[min(i, 1)] if pooled else 1 for i, ((_, _, pooled), _) in enumerate(stages)
        ),
    }


def _assume_reduction(raw: RawCheckpoint, settings: dict[str, Any]) -> list[str]:
    pooled = any(factor > 1 for factor in settings["reduction"])
    return [f"reduction {settings['reduction']}"] if pooled else []


def _switches(raw: RawCheckpoint, model: str) -> dict[str, Any]:
    attention = f"{_LAYER}0.attention.attention"
    alpha = re.compile(re.escape(f"{_LAYER}0.layerscale_h") + r"(\d+)\.alpha")
    branches = sorted(int(match[1]) for name in raw.state if (match := alpha.fullmatch(name)))
    switches: dict[str, Any] = {
        "weight_bits": weight_bits(raw),
        "act_bits": 1 if f"{attention}.att_prob_clip" in raw.state else 32,
        "norm": "batch_norm" if "vit.layernorm.running_mean" in raw.state else "layer_norm",
        "layer_scale": f"{_LAYER}0.output.layerscale.alpha" in raw.state,
        "pool_branches": tuple(branches),
        "clip_val": clip_val(raw),
    }
    if model == "react_deit":
        return switches | {"class_token": "vit.embeddings.cls_token" in raw.state}
    some_fp = "vit.encoder.patch_embed1.proj.weight" in raw.state
    some_fp = some_fp and "vit.encoder.patch_embed1.move" not in raw.state
    return switches | {"some_fp": some_fp}


def weight_bits(raw: RawCheckpoint) -> int:
    """Returns the bits that the arguments state; `check_bits` compares them with the arrays."""
    bits = raw.args.get("weight_bits", 1)
    if type(bits) is not int:
        raise UserError(f"{raw.origin}: the weight_bits of its args are {bits!r}, expected a whole number")
    return bits


def clip_val(raw: RawCheckpoint) -> float:
    limits = (a for name, a in raw.state.items() if name.endswith(".weight_clip_val"))
    return float(np.max(next(limits, np.array(DEFAULT_CLIP_VAL))))


def check_bits(config: Config, raw: RawCheckpoint) -> None:
    """Raises `UserError` if the bits do not fit the arrays: only weights of 2 to 8 bits are clipped."""
    clipped = any(name.endswith(".weight_clip_val") for name in raw.state)
    bits = config.get("weight_bits", 32)
    if clipped != (2 <= bits <= 8):
        raise UserError(
            f"{raw.origin}: weight_bits is {bits}, and its arrays are those of"
            f" {'2 to 8 bits' if clipped else '1 or 32 bits'}; say how many with weight_bits"
        )


FORMAT = Format(
    name=NAME,
    models=MODELS,
    check=check,
    naming=naming,
    recognise=recognise,
    interpret=interpret,
    describe=describe,
    writes_constants=True,
    own_constants=constants,
    check_raw=check_bits,
)
