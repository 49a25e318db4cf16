"""Models made fit for another task: another image size, other classes, other names of them."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.layers.init import bias_init, kernel_init
from bvit_jax.weights.formats import FORMATS
from bvit_jax.weights.names import path_name
from bvit_jax.weights.positions import resize_positions
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.weights.state_dicts import StateDict, abstract_variables


def resized(pretrained: Pretrained, image_size: int) -> Pretrained:
    """Returns the model for another image size, position embeddings interpolated as DeiT does.

    Raises:
      UserError: the model cannot have that size.
    """
    config = pretrained.config.copy_and_resolve_references()
    config.image_size = image_size
    extra = _extra_tokens(config)
    abstract = abstract_variables(models.create_model(config), image_size)

    def resize(path: tuple, array: np.ndarray, target: jax.ShapeDtypeStruct) -> np.ndarray:
        if array.shape == target.shape:
            return array
        name = path_name(path)
        if not name.endswith("/positions"):
            raise UserError(
                f"with images of {image_size} pixels {name} would be {target.shape} and not {array.shape}:"
                " a stage would be smaller than its window; choose a larger --image_size"
            )
        first = extra if name.startswith("params/embedding/") else 0
        return resize_positions(array, first, round((target.shape[1] - first) ** 0.5))

    variables = jax.tree_util.tree_map_with_path(resize, pretrained.variables, abstract)
    return dataclasses.replace(
        pretrained,
        config=config,
        variables=variables,
        preprocessing=pretrained.preprocessing.scaled_to(image_size),
        bookkeeping=_resized_bookkeeping(pretrained, config),
    )


def _extra_tokens(config: ConfigDict) -> int:
    """Returns the number of tokens in front of the patches."""
    class_token = models.same_layers(config.name, "deit") or config.get("class_token", False)
    return int(class_token) + int(config.get("distillation_token", False))


def _resized_bookkeeping(pretrained: Pretrained, config: ConfigDict) -> StateDict:
    """Returns the bookkeeping with the masks of the new size in place of those of the old one."""
    kept = {name: a for name, a in pretrained.bookkeeping.items() if not name.endswith("attn_mask")}
    if len(kept) == len(pretrained.bookkeeping):
        return kept
    constants = FORMATS[pretrained.bookkeeping_format].constants(config, {})
    return kept | {name: a for name, a in constants.items() if name.endswith("attn_mask")}


def with_new_head(pretrained: Pretrained, class_names: tuple[str, ...]) -> Pretrained:
    """Returns the model with newly initialised classifiers for other classes."""
    config = pretrained.config.copy_and_resolve_references()
    config.num_classes = len(class_names)
    params = dict(pretrained.variables["params"])
    for i, name in enumerate(name for name in ("head", "distillation_head") if name in params):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        fan_in = kernel.shape[0]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        new_kernel = kernel_init(config.weight_init, fan_in)(keys[0], (fan_in, config.num_classes))
        new_bias = bias_init(config.weight_init, fan_in)(keys[1], (config.num_classes,))
        params[name] = {
            "kernel": np.asarray(new_kernel, kernel.dtype),
            "bias": np.asarray(new_bias, bias.dtype),
        }
    variables = pretrained.variables | {"params": params}
    return dataclasses.replace(pretrained, config=config, variables=variables, class_names=class_names)


def with_class_names(pretrained: Pretrained, class_names: tuple[str, ...]) -> Pretrained:
    """Returns the model with other names for its classes."""
    return dataclasses.replace(pretrained, class_names=class_names)
