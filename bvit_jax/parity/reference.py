"""Which of our models the ``meta`` of a golden file describes: that of BinaryViT's code, or of BHViT's."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.weights.formats import bhvit
from bvit_jax.weights.formats.reference import MODEL_TYPES, NORM_EPSILON, from_config_values


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


def bhvit_config(meta: Mapping[str, Any]) -> ConfigDict:
    """Returns our model configuration for the ``meta`` of a golden file of BHViT's code.

    Raises:
      UserError: something is missing or unknown.
    """
    try:
        args = meta["args"]
        settings = bhvit.from_config_values(meta["config"]) | {
            "image_size": meta["image_size"],
            "window_size": meta["window_size"],
            "num_classes": meta["num_classes"],
            "norm_epsilon": NORM_EPSILON,
            "weight_bits": meta["weight_bits"],
            "act_bits": meta["input_bits"],
            "norm": "batch_norm" if args["replace_ln_bn"] else "layer_norm",
            "layer_scale": not args["disable_layerscale"],
            "shift_branches": tuple(k for k in (3, 5) if args[f"shift{k}"]),
            "drop_path": args["drop_path"],
            **{key: args[key] for key in ("gsb", "recu", "some_fp")},
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"the golden file's meta has no or an unknown {error}") from error
    return models.model_config("bhvit", **settings)
