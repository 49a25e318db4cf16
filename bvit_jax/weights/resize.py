"""Models resized: to other image sizes, and to other numbers of classes."""

import dataclasses
import math

import jax
import numpy as np
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.layers.init import bias_init, kernel_init
from bvit_jax.weights.class_names import default_class_names
from bvit_jax.weights.formats import FORMATS
from bvit_jax.weights.naming import path_name
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.weights.state_dicts import StateDict, abstract_variables


def adapted(pretrained: Pretrained, image_size: int, num_classes: int) -> Pretrained:
    """Returns the model for an image size and a number of classes; unchanged if it has both.

    Raises:
      UserError: the model cannot have that size.
    """
    if pretrained.config.image_size != image_size:
        pretrained = resized(pretrained, image_size)
    if pretrained.config.num_classes != num_classes:
        pretrained = with_new_head(pretrained, default_class_names(num_classes))
    return pretrained


def resized(pretrained: Pretrained, image_size: int) -> Pretrained:
    """Returns the model for another image size, its position embeddings interpolated as DeiT does.

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
                f"for images of {image_size} pixels {name} would have shape {target.shape} instead of"
                f" {array.shape}: a stage would be smaller than its window; choose a larger --image_size"
            )
        first = extra if name.startswith("params/embedding/") else 0
        tokens = array.reshape(1, -1, array.shape[-1])  # some models keep them as a grid
        side = round((math.prod(target.shape[:-1]) - first) ** 0.5)
        return resize_positions(tokens, first, side).reshape(target.shape)

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
    """Returns the bookkeeping with its attention masks replaced by those of the new size."""
    kept = {name: a for name, a in pretrained.bookkeeping.items() if not name.endswith("attn_mask")}
    if len(kept) == len(pretrained.bookkeeping):
        return kept
    constants = FORMATS[pretrained.bookkeeping_format].constants(config, {})
    return kept | {name: a for name, a in constants.items() if name.endswith("attn_mask")}


def resize_positions(positions: np.ndarray, extra_tokens: int, side: int) -> np.ndarray:
    """Resizes the grid of position embeddings bicubically, as DeiT does for fine-tuning.

    The filter is that of PyTorch's ``interpolate(mode="bicubic", align_corners=False)``: no
    antialiasing, the border repeated.

    Args:
      positions: (1, extra_tokens + n², channels).
      extra_tokens: number of embeddings at the front that belong to no patch, which are kept.
      side: tokens along each side of the new grid.

    Returns:
      (1, extra_tokens + side², channels) in the dtype of ``positions``.
    """
    first, patches = positions[:, :extra_tokens], positions[:, extra_tokens:]
    channels = positions.shape[-1]
    old_side = round(patches.shape[1] ** 0.5)
    grid = patches.reshape(old_side, old_side, channels).astype(np.float64)
    weights = _bicubic_weights(old_side, side)
    grid = np.einsum("io,jp,opc->ijc", weights, weights, grid, optimize=True)
    grid = grid.reshape(1, side * side, channels).astype(positions.dtype)
    return np.concatenate([first, grid], axis=1)


def _bicubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the matrix (new, old) that resizes one axis."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    base = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        at = base + offset
        np.add.at(weights, (np.arange(new), np.clip(at, 0, old - 1)), _cubic(np.abs(centre - at)))
    return weights


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Returns Keys' cubic convolution kernel at distances from 0 to 2."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


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
