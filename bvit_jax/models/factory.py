"""From a configuration to a model: names, defaults and the checks of every size."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from bvit_jax.errors import UserError, nearest
from bvit_jax.layers.init import WeightInit
from bvit_jax.layers.norm import NormName
from bvit_jax.models.binaryvit import STRIDE, BinaryViT
from bvit_jax.models.bivit.paper import BiViTDeiT, BiViTSwin
from bvit_jax.models.bivit.release import BiViTReleaseDeiT, BiViTReleaseSwin
from bvit_jax.models.deit import DeiT
from bvit_jax.models.execution.stages import POLICIES, Execution, Remat
from bvit_jax.models.react_deit import ExtraRes
from bvit_jax.models.swin import MERGE, Swin

if TYPE_CHECKING:  # models also run where ml-collections is not installed
    from ml_collections import ConfigDict

MODELS: dict[str, type[nn.Module]] = {
    "binaryvit": BinaryViT,
    "bivit_deit": BiViTDeiT,
    "bivit_release_deit": BiViTReleaseDeiT,
    "bivit_release_swin": BiViTReleaseSwin,
    "bivit_swin": BiViTSwin,
    "deit": DeiT,
    "extra_res": ExtraRes,
    "swin": Swin,
}
BACKBONES = {  # the real-valued model whose layers a binary one has
    "bivit_deit": "deit",
    "bivit_release_deit": "deit",
    "bivit_release_swin": "swin",
    "bivit_swin": "swin",
}
DEITS = ("deit", "bivit_deit", "bivit_release_deit")  # the backbone, real-valued or binary
SWINS = ("swin", "bivit_swin", "bivit_release_swin")
MAX_SIZE = 1 << 24  # of anything: beyond it something is damaged
_NOT_SETTINGS = {
    "parent",
    "name",
    "dtype",
    "packed",
    "integer_products",
    "one_pass_norms",
    "block",
    "execution",
}


def _defaults(name: str) -> dict[str, Any]:
    """Returns the settings of a model and their defaults: its own fields and those of its blocks."""
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"config.model.name is {name!r}" + nearest(str(name), MODELS))
    own = {field.name: field.default for field in dataclasses.fields(MODELS[name])}
    settings = own | vars(_default_block(name))
    return {key: value for key, value in settings.items() if key not in _NOT_SETTINGS}


def _default_block(name: str) -> Any:
    """Returns what the blocks of a model have in common where nothing else is said."""
    return next(f.default for f in dataclasses.fields(MODELS[name]) if f.name == "block")


def _complete(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings of a model, the given ones in place of the defaults."""
    defaults = _defaults(name)
    for key in settings:
        if key not in defaults:
            raise UserError(f"config.model.{key} is not a setting of {name}" + nearest(key, defaults))
    return {**defaults, **settings}


def model_config(name: str, **settings: Any) -> "ConfigDict":
    """Returns the complete configuration of a model, ``settings`` in place of its defaults.

    Raises:
      UserError: there is no such model or setting.
    """
    from ml_collections import ConfigDict

    return ConfigDict({"name": name, **_complete(name, settings)})


def real_backbone(config: "Mapping[str, Any]") -> "ConfigDict | None":
    """Returns the complete configuration of the real-valued model of the same sizes, None if there is none.

    Args:
      config: complete configuration of a model.
    """
    name = BACKBONES.get(config["name"])
    if name is None:
        return None
    return model_config(name, **{key: config[key] for key in _defaults(name) if key in config})


def create_model(
    config: "Mapping[str, Any] | ConfigDict",
    dtype: DTypeLike = jnp.float32,
    *,
    remat: Remat = "none",
    scan_blocks: bool = False,
    one_pass_norms: bool = False,
    packed: bool = False,
) -> nn.Module:
    """Returns the model that ``config`` describes, computing in ``dtype``.

    Args:
      config: ``name`` and any settings of the model, as `model_config` returns them.
      dtype: dtype of the activations; parameters are float32 whatever it is.
      remat, scan_blocks: how it runs, which is no part of its description; see
        `bvit_jax.models.execution.stages.Execution`.
      one_pass_norms: likewise, of models with batch norms; see `bvit_jax.layers.norm.BatchNorm`.
      packed: likewise, of models for which `packs_signs` is true; see `bvit_jax.models.blocks.BlockConfig`.

    Raises:
      UserError: a setting is unknown or out of range, or sizes do not divide; the message names the
        key.
    """
    settings = {key: config[key] for key in config}
    name = settings.pop("name", None)
    settings = _complete(name, settings)
    _check(name, settings)
    block = _default_block(name)
    shared = {key: settings.pop(key) for key in vars(block) if key in settings}
    execution = _execution(name, remat, scan_blocks)
    if one_pass_norms and (settings | shared).get("norm") != "batch_norm":
        raise UserError(f"config.one_pass_norms is True: {name} has no batch norms; set it to False")
    if packs_signs(name):
        shared |= {
            "integer_products": remat == "products",
            "one_pass_norms": one_pass_norms,
            "packed": packed,
        }
    return MODELS[name](
        **settings, block=dataclasses.replace(block, **shared, dtype=dtype), execution=execution
    )


def _execution(name: str, remat: Remat, scan_blocks: bool) -> Execution:
    known = hasattr(_default_block(name), "integer_products")
    policies = ("none", *(policy for policy in POLICIES if known or policy != "products"))
    if remat not in policies:
        raise UserError(f"config.remat is {remat!r}; of {name}, expected one of {', '.join(policies)}")
    return Execution(remat, scan_blocks)


def packs_signs(name: str) -> bool:
    """Returns whether a model of this name is made of the blocks that can pack signs into bits."""
    return hasattr(_default_block(name), "packed")


def num_params(params: Any) -> int:
    """Returns the number of learned values in a parameter tree (arrays or their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _check(name: str, s: dict[str, Any]) -> None:
    for key, default in _defaults(name).items():
        _require(_is_like(s[key], default), key, s[key], f"expected {_KINDS[type(default)]}")
    if name == "binaryvit":
        _check_pyramid(s)
    elif name in SWINS:
        _check_swin(s)
    else:
        for key in ("width", "depth", "num_heads", "mlp_dim"):
            _require(s[key] > 0, key, s[key], "expected a positive whole number")
        _check_grid(s)
        _check_heads(s["width"], s["num_heads"], "width")
    for key in ("drop_path", "dropout", "attention_dropout"):
        _require(0 <= s[key] < 1, key, s[key], "expected a rate from 0 to below 1")
    _require(s["num_classes"] > 0, "num_classes", s["num_classes"], "expected at least 1")
    _require(0 < s["norm_epsilon"] < 1, "norm_epsilon", s["norm_epsilon"], "expected between 0 and 1")
    _require_choice("weight_init", s["weight_init"], typing.get_args(WeightInit))
    if name in DEITS:
        _require(
            s["distillation_token"] or not s["distillation_head"],
            "distillation_head",
            True,
            "it reads the distillation token; set distillation_token to True",
        )
    if "act_bits" in s:
        _require_choice("act_bits", s["act_bits"], (1, 32))
    if name in DEITS + SWINS:
        return
    _require_choice("norm", s["norm"], typing.get_args(NormName))
    _require_choice("weight_bits", s["weight_bits"], (1, 2, 3, 4, 5, 6, 7, 8, 32))
    _require(s["clip_val"] > 0, "clip_val", s["clip_val"], "expected above 0")
    group = s["batch_norm_group"]
    _require(group >= 0, "batch_norm_group", group, "expected a number of images, or 0")
    _require(
        group == 0 or s["norm"] == "batch_norm",
        "batch_norm_group",
        group,
        "there are no batch norms; set it to 0 or norm to batch_norm",
    )
    sizes = s["pool_branches"]
    odd = all(size > 0 and size % 2 == 1 for size in sizes)
    _require(odd, "pool_branches", sizes, "expected odd kernel sizes")
    _require(len(set(sizes)) == len(sizes), "pool_branches", sizes, "expected each size once")
    if name == "extra_res":
        _check_expansion(s["mlp_dim"], s["width"], "mlp_dim")
        _require(
            not (s["class_token"] and s["pool_branches"]),
            "class_token",
            True,
            "pooling branches need the token grid; set pool_branches to () or class_token to False",
        )


def _check_pyramid(s: dict[str, Any]) -> None:
    per_stage = ("width", "depth", "num_heads", "mlp_dim", "reduction")
    stages = len(s["width"])
    _require(stages > 0, "width", s["width"], "expected one width a stage")
    for key in per_stage:
        _require(
            len(s[key]) == stages and all(value > 0 for value in s[key]),
            key,
            s[key],
            f"expected {stages} positive whole numbers, one a stage as in config.model.width",
        )
    side = _check_grid(s)
    for stage in range(stages):
        _check_heads(s["width"][stage], s["num_heads"][stage], f"width[{stage}]")
        _check_expansion(s["mlp_dim"][stage], s["width"][stage], f"mlp_dim[{stage}]")
        reduction = s["reduction"][stage]
        _require(
            side % reduction == 0,
            f"reduction[{stage}]",
            reduction,
            f"it must divide the stage's {side}×{side} token grid; change it or the image size",
        )
        if stage + 1 == stages:
            break
        _require(
            side % STRIDE == 0,
            "image_size",
            s["image_size"],
            f"stage {stage} has a {side}×{side} token grid, which {STRIDE} must divide; "
            f"use a multiple of {s['patch_size'] * STRIDE ** (stages - 1)}",
        )
        side //= STRIDE
        wider, narrower = s["width"][stage + 1], s["width"][stage]
        _require(
            s["some_fp"] or wider % narrower == 0,
            f"width[{stage + 1}]",
            wider,
            f"expected a multiple of the previous stage's {narrower}",
        )


def _check_swin(s: dict[str, Any]) -> None:
    stages = len(s["depth"])
    _require(stages > 0, "depth", s["depth"], "expected one depth a stage")
    for key in ("depth", "num_heads"):
        _require(
            len(s[key]) == stages and all(value > 0 for value in s[key]),
            key,
            s[key],
            f"expected {stages} positive whole numbers, one a stage as in config.model.depth",
        )
    for key in ("width", "window_size", "mlp_ratio"):
        _require(s[key] > 0, key, s[key], "expected a positive whole number")
    side = _check_grid(s)
    for stage, num_heads in enumerate(s["num_heads"]):
        _check_heads(s["width"] * MERGE**stage, num_heads, "width")
        window = min(s["window_size"], side)
        _require(
            side % window == 0 and (stage + 1 == stages or side % MERGE == 0),
            "image_size",
            s["image_size"],
            f"stage {stage} has a {side}×{side} token grid, which windows of {window} must divide, and"
            f" {MERGE} before another stage; use a multiple of"
            f" {s['patch_size'] * MERGE ** (stages - 1) * s['window_size']}",
        )
        side //= MERGE


def _check_grid(s: dict[str, Any]) -> int:
    image, patch = s["image_size"], s["patch_size"]
    _require(patch > 0, "patch_size", patch, "expected a positive whole number")
    _require(
        image > 0 and image % patch == 0,
        "image_size",
        image,
        f"expected a multiple of config.model.patch_size = {patch}",
    )
    return image // patch


def _check_heads(width: int, num_heads: int, key: str) -> None:
    _require(width % num_heads == 0, key, width, f"expected a multiple of its {num_heads} heads")


def _check_expansion(mlp_dim: int, width: int, key: str) -> None:
    _require(mlp_dim % width == 0, key, mlp_dim, f"expected a multiple of the width {width}")


_KINDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a name",
    tuple: "a tuple of whole numbers",
}


def _is_like(value: Any, default: Any) -> bool:
    """Returns whether a value is of the kind of a setting's default."""
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and all(_is_like(item, 0) for item in value)
    return type(value) is type(default) and (not isinstance(default, int) or abs(value) < MAX_SIZE)


def _require_choice(key: str, value: Any, choices: tuple) -> None:
    _require(value in choices, key, value, "expected one of " + ", ".join(map(str, choices)))


def _require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"config.model.{key} is {value!r}: {expected}")
