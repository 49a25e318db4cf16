"""How the PyTorch reference spells its models, and which of ours they are.

The reference describes a model by a configuration directory, a model type and command-line switches. Here
those of its ``scripts/*.sh`` go by the names of our ``configs/*.py``.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.errors import UserError, nearest
from bvit_jax.weights.formats.reference import MODEL_TYPES, NORM_EPSILON, from_config_values

_DEIT_DIRECTORY, _BINARYVIT_DIRECTORY = "deit-small-patch16-224", "binaryvit-small-patch4-224"

# The switches, with the values they have unless a script sets them.
_SWITCHES: dict[str, Any] = {
    "weight_bits": 1,
    "input_bits": 1,
    "nb_classes": 1000,
    "avg_res3": False,
    "avg_res5": False,
    "replace_ln_bn": True,
    "disable_layerscale": False,
    "enable_cls_token": False,
    "some_fp": False,
}
_POOLING = {"avg_res3": True, "avg_res5": True}


def _react_deit(**switches: bool) -> dict[str, Any]:
    return {"model": _DEIT_DIRECTORY, "model_type": "extra-res", **_SWITCHES, **switches}


def _binaryvit(**switches: bool) -> dict[str, Any]:
    return {
        "model": _BINARYVIT_DIRECTORY,
        "model_type": "extra-res-pyramid",
        **_SWITCHES,
        **_POOLING,
        **switches,
    }


_NAMED: dict[str, dict[str, Any]] = {
    "binaryvit_small": _binaryvit(),
    "binaryvit_small:some_fp": _binaryvit(some_fp=True),
    "react_deit_small:cls": _react_deit(enable_cls_token=True, disable_layerscale=True),
    "react_deit_small:avg_pool": _react_deit(disable_layerscale=True),
    "react_deit_small:multi_branch": _react_deit(disable_layerscale=True, **_POOLING),
    "react_deit_small:ls": _react_deit(**_POOLING),
    "deit_small": {
        "model": _DEIT_DIRECTORY,
        "model_type": "deit",
        **_SWITCHES,
        "weight_bits": 32,
        "input_bits": 32,
        "replace_ln_bn": False,
    },
}


def named(name: str) -> dict[str, Any]:
    """Returns the reference's arguments for one of our configurations.

    They are ``model`` (a directory of its ``configs/``), ``model_type``, ``weight_bits``,
    ``input_bits``, ``nb_classes`` and the switches.

    Raises:
      UserError: the reference has no such model.
    """
    if name not in _NAMED:
        raise UserError(f"--model is {name!r}{nearest(name, _NAMED)}")
    return dict(_NAMED[name])


def config_of(meta: Mapping[str, Any]) -> ConfigDict:
    """Returns our model configuration for the ``meta`` of a golden file of the BinaryViT code.

    The reference describes a model by a base configuration, overrides of it, and command-line switches.

    Raises:
      UserError: something is missing, or we have no such model.
    """
    try:
        name, args = MODEL_TYPES[meta["model_type"]], meta["args"]
        settings = from_config_values(meta["config"])
        settings |= {"num_classes": meta["num_classes"], "norm_epsilon": NORM_EPSILON}
        settings["drop_path"] = args["drop_path"]
        if name != "deit":
            settings["weight_bits"], settings["act_bits"] = meta["weight_bits"], meta["input_bits"]
            settings["norm"] = "batch_norm" if args["replace_ln_bn"] else "layer_norm"
            settings["layer_scale"] = not args["disable_layerscale"]
            settings["pool_branches"] = tuple(k for k in (3, 5) if args[f"avg_res{k}"])
        if name == "react_deit":
            settings["class_token"] = args["enable_cls_token"]
        if name == "binaryvit":
            settings["some_fp"] = args["some_fp"]
    except (KeyError, TypeError) as error:
        raise UserError(f"the golden file's meta has no or an unknown {error}") from error
    return models.model_config(name, **settings)
