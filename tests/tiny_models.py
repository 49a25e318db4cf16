"""Small models, the only place where tests spell their sizes, and random weights for them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.weights.preprocessing import deit_preprocessing
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.weights.state_dicts import Variables, abstract_variables

DEIT: dict[str, Any] = {"width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 16, "image_size": 32}
SWIN: dict[str, Any] = {
    "width": 6,
    "depth": (2, 2),
    "num_heads": (1, 2),
    "window_size": 4,
    "image_size": 32,
}
PYRAMID: dict[str, Any] = {
    "width": (4, 8),
    "depth": (1, 2),
    "num_heads": (1, 2),
    "mlp_dim": (8, 16),
    "reduction": (2, 1),
    "image_size": 32,
}
BHVIT: dict[str, Any] = {  # with the images and windows of its code
    "width": 4,
    "depth": (1, 1, 1, 1),
    "num_heads": (1, 2),
    "mlp_dim": (4, 8, 16, 32),
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit", DEIT),
    "deit_1e-5": ("deit", DEIT | {"norm_epsilon": 1e-5}),
    "deit_token": ("deit", DEIT | {"distillation_token": True}),
    "deit_heads": ("deit", DEIT | {"distillation_token": True, "distillation_head": True}),
    "swin": ("swin", SWIN),
    "bivit_release_deit": ("bivit_release_deit", DEIT),
    "bivit_release_deit_plain": (
        "bivit_release_deit",
        DEIT | {"distillation_token": False, "distillation_head": False},
    ),
    "bivit_release_swin": ("bivit_release_swin", SWIN),
    "react_deit": (
        "react_deit",
        DEIT | {"depth": 1, "class_token": True, "pool_branches": (), "layer_scale": False},
    ),
    "react_deit_ls": ("react_deit", DEIT),
    "binaryvit": ("binaryvit", PYRAMID),
    "binaryvit_some_fp": ("binaryvit", PYRAMID | {"some_fp": True}),
    "binaryvit_w4": ("binaryvit", PYRAMID | {"weight_bits": 4, "clip_val": 1.5}),
    "binaryvit_w1a32": ("binaryvit", PYRAMID | {"act_bits": 32}),
    "bhvit": ("bhvit", BHVIT),
    "binaryvit_layer_norm": ("binaryvit", PYRAMID | {"norm": "layer_norm"}),
}

# For tests that compile gradients: a few tokens, so that little is computed in float64.
SMALLEST: dict[str, dict[str, Any]] = {
    "deit": DEIT | {"image_size": 8, "patch_size": 4},
    "react_deit": DEIT | {"depth": 1, "image_size": 12, "patch_size": 4},
    "binaryvit": PYRAMID | {"depth": (1, 1), "image_size": 16, "patch_size": 2},
    # Two windows in the third stage.
    "bhvit": {
        "width": 4,
        "depth": (1, 1, 1, 1),
        "num_heads": (1, 2),
        "mlp_dim": (4, 16, 16, 32),
        "window_size": 1,
        "image_size": 16,
        "patch_size": 2,
    },
    # Shifted and not in turns, and one that is left over.
    "swin": {
        "width": 8,
        "depth": (5,),
        "num_heads": (2,),
        "window_size": 2,
        "mlp_ratio": 1,
        "image_size": 8,
        "patch_size": 2,
    },
}
SMALLEST |= dict.fromkeys(("bivit_deit", "bivit_release_deit"), SMALLEST["deit"])
SMALLEST |= dict.fromkeys(("bivit_swin", "bivit_release_swin"), SMALLEST["swin"])


def smallest(
    name: str,
    dtype: DTypeLike = jnp.float32,
    execution: models.Execution = models.Execution(),  # noqa: B008
    **settings: Any,
) -> tuple[nn.Module, ConfigDict]:
    """Returns one of `SMALLEST` with three classes, and its configuration."""
    config = models.model_config(name, **{"num_classes": 3, **SMALLEST[name], **settings})
    return models.create_model(config, dtype, execution), config


def spread_variables(model: nn.Module, config: ConfigDict, dtype: DTypeLike = np.float32) -> Variables:
    """Returns random variables that use the whole of every nonlinearity, without compiling anything."""
    rng = np.random.default_rng(0)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape) * 0.5
        if path[-1].key == "var":
            values = 0.1 + np.abs(values)
        if path[-1].key == "prob_scale":
            values = 0.03 + 0.05 * np.abs(values)
        return jnp.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_variables(model, config.image_size))


def images_for(config: ConfigDict, batch: int = 4, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Returns random images of the size that a model takes."""
    shape = (batch, config.image_size, config.image_size, 3)
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def tiny_config(name: str, num_classes: int = 3, **settings: Any) -> ConfigDict:
    """Returns the configuration of a small model."""
    model, sizes = TINY[name]
    return models.model_config(model, **sizes | settings, num_classes=num_classes)


def abstract_of(config: ConfigDict) -> Variables:
    """Returns the shapes of a model's variables."""
    return jax.tree.map(lambda leaf: leaf, _abstract(models.create_model(config), config.image_size))


_abstract = functools.cache(abstract_variables)  # which takes long


def random_variables(abstract: Variables, seed: int = 0, dtype: Any = np.float32) -> Variables:
    """Returns random variables, the variances among them positive."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = 0.3 * rng.standard_normal(leaf.shape)
        return np.asarray(np.abs(values) + 0.5 if path[-1].key == "var" else values, dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def tiny_pretrained(name: str, seed: int = 0, dtype: Any = np.float32, **settings: Any) -> Pretrained:
    """Returns a small model with random weights."""
    config = tiny_config(name, **settings)
    return Pretrained(
        config=config,
        variables=random_variables(abstract_of(config), seed, dtype),
        preprocessing=deit_preprocessing(config.image_size),
        class_names=tuple(f"name {i}" for i in range(config.num_classes)),
    )


def assert_same_trees(actual: Any, expected: Any) -> None:
    """Asserts that two trees have equal arrays of equal dtypes in equal places."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_same_states(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Asserts that two state dicts are equal bit for bit: names, dtypes, shapes and content."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name
