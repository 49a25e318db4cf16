"""Checkpoints of BHViT's code: ``.pth`` with ``model`` and ``args``, and its ``config.json``.

Source: ``main_new.py``, ``transformer/`` and ``configs/`` of github.com/IMRL/BHViT.
"""

from collections.abc import Mapping
from typing import Any

from bvit_jax.models.bhvit import SHIFTS
from bvit_jax.weights.formats import reference
from bvit_jax.weights.formats.base import Config, Format, Interpretation, check_epsilon
from bvit_jax.weights.naming import Naming, bhvit_naming
from bvit_jax.weights.preprocessing import Preprocessing, deit_preprocessing
from bvit_jax.weights.raw_checkpoint import RawCheckpoint

NAME = "bhvit"
MODEL_TYPE = "dbhvit"
WINDOW_SIZE = 7  # set by the code

_A, _B = "vit.encoder.layerA.", "vit.encoder.layerB."
_PATCHES = "vit.embeddings.patch_embeddings.proj.weight"


def naming(config: Config) -> Naming:
    """Returns the names of the arrays of a BHViT."""
    return bhvit_naming(sum(config["depth"][:2]))


def check(config: Config) -> None:
    """Raises `UserError` if the code cannot compute this model."""
    check_epsilon("BHViT's code", reference.NORM_EPSILON, config)


def recognise(raw: RawCheckpoint) -> bool:
    """Returns whether the names are those of BHViT's code."""
    return _PATCHES in raw.state and f"{_A}0.GC.cov1.weight" in raw.state


def interpret(raw: RawCheckpoint) -> Interpretation:
    """Finds the model from its arrays, and from its arguments where these leave something open."""
    blocks = _blocks(raw)
    stages = [[block for block in blocks if block[0] == blocks[0][0] << stage] for stage in range(4)]
    patch_size = raw.shape(_PATCHES)[-1]
    settings: dict[str, Any] = {
        "num_classes": raw.shape("classifier.bias")[0],
        "patch_size": patch_size,
        "image_size": raw.shape("vit.embeddings.position_embeddings")[-1] * patch_size,
        "width": blocks[0][0],
        "depth": tuple(len(stage) for stage in stages),
        "mlp_dim": tuple(stage[0][1] for stage in stages if stage),
        "norm_epsilon": reference.NORM_EPSILON,
        "window_size": WINDOW_SIZE,
        **_switches(raw),
    }
    assumed = [] if "weight_bits" in raw.args else [f"weight_bits {settings['weight_bits']}"]
    quantisers = [f"{_B}{i}.attention.attention.att_prob_quantizer.alpha" for i in range(raw.count(_B))]
    if all(name in raw.state for name in quantisers):
        per_block = [raw.shape(name)[0] for name in quantisers]
        settings["num_heads"] = per_block[0], per_block[-1]
    else:
        settings["num_heads"] = tuple(max((blocks[0][0] << i) // reference.HEAD_SIZE, 1) for i in (2, 3))
        assumed.append(f"num_heads {settings['num_heads']} ({reference.HEAD_SIZE} channels each)")
    if "drop_path" in raw.args:
        settings["drop_path"] = float(raw.args["drop_path"])
    said = from_config_values(raw.values)
    settings |= {key: value for key, value in said.items() if key in settings}
    labels = reference.labels_of(raw.values, settings["num_classes"])
    preprocessing = deit_preprocessing(settings["image_size"])
    return Interpretation("bhvit", settings, preprocessing, labels, tuple(assumed))


def from_config_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our settings for the keys of the code's ``config.json``."""
    settings = reference.from_config_values(values)
    if "width" in settings:
        settings["width"] = settings["width"][0]
    if "num_heads" in settings:
        settings["num_heads"] = settings["num_heads"][2:]
    return settings


def describe(config: Config, class_names: tuple[str, ...], preprocessing: Preprocessing) -> dict[str, Any]:
    """Returns the ``config.json`` from which the code builds a model of this configuration."""
    depth = config["depth"]
    return reference.describe(config, class_names, preprocessing) | {
        "hidden_size": [config["width"] << stage for stage in range(4)],
        "num_attention_heads": [1, 1, *config["num_heads"]],
        "num_hidden_layersA": sum(depth[:2]),
        "num_hidden_layersB": sum(depth[2:]),
    }


def _blocks(raw: RawCheckpoint) -> list[tuple[int, int]]:
    """Returns width and feed-forward width of each block."""
    blocks = [f"{kind}{i}" for kind in (_A, _B) for i in range(raw.count(kind))] or [f"{_A}0"]
    return [
        (raw.shape(f"{block}.layernorm_before.weight")[0], raw.shape(f"{block}.intermediate.dense.weight")[0])
        for block in blocks
    ]


def _switches(raw: RawCheckpoint) -> dict[str, Any]:
    attention = f"{_B}0.attention.attention"
    gsb = f"{attention}.att_prob_clip" in raw.state
    levels = f"{attention}.att_prob_quantizer.alpha" in raw.state
    return {
        "weight_bits": reference.weight_bits(raw),
        "act_bits": 1 if gsb or levels else 32,
        "norm": "batch_norm" if "vit.layernorm.running_mean" in raw.state else "layer_norm",
        "layer_scale": f"{_A}0.output.layerscale.alpha" in raw.state,
        "shift_branches": tuple(k for k in SHIFTS if f"{_A}0.layerscale_h{k}.alpha" in raw.state),
        "clip_val": reference.clip_val(raw),
        "gsb": gsb,
        "recu": bool(raw.args.get("recu", False)),
        "some_fp": "vit.encoder.patch_embed1.move" not in raw.state,
    }


FORMAT = Format(
    name=NAME,
    models=("bhvit",),
    check=check,
    naming=naming,
    recognise=recognise,
    interpret=interpret,
    describe=describe,
    writes_constants=True,
    own_constants=reference.constants,
    check_raw=reference.check_bits,
)
