"""Small models with random weights, for the tests that move weights around."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.weights.formats import deit_preprocessing
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.weights.state_dicts import Variables, abstract_variables

_DEIT = {"width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 16, "image_size": 32}
_PYRAMID = {
    "width": (4, 8),
    "depth": (1, 2),
    "num_heads": (1, 2),
    "mlp_dim": (8, 16),
    "reduction": (2, 1),
    "image_size": 32,
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit", _DEIT),
    "deit_1e-5": ("deit", _DEIT | {"norm_epsilon": 1e-5}),
    "deit_token": ("deit", _DEIT | {"distillation_token": True}),
    "deit_heads": ("deit", _DEIT | {"distillation_token": True, "distillation_head": True}),
    "swin": (
        "swin",
        {"width": 6, "depth": (2, 2), "num_heads": (1, 2), "image_size": 32, "window_size": 4},
    ),
    "bivit_release_deit": ("bivit_release_deit", _DEIT),
    "bivit_release_deit_plain": (
        "bivit_release_deit",
        _DEIT | {"distillation_token": False, "distillation_head": False},
    ),
    "bivit_release_swin": (
        "bivit_release_swin",
        {"width": 6, "depth": (2, 2), "num_heads": (1, 2), "image_size": 32, "window_size": 4},
    ),
    "react_deit": (
        "react_deit",
        {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 16, "image_size": 32, "class_token": True}
        | {"pool_branches": (), "layer_scale": False},
    ),
    "react_deit_ls": (
        "react_deit",
        {"width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 16, "image_size": 32},
    ),
    "binaryvit": ("binaryvit", _PYRAMID),
    "binaryvit_some_fp": ("binaryvit", _PYRAMID | {"some_fp": True}),
    "binaryvit_w4": ("binaryvit", _PYRAMID | {"weight_bits": 4, "clip_val": 1.5}),
    "binaryvit_w1a32": ("binaryvit", _PYRAMID | {"act_bits": 32}),
    "binaryvit_layer_norm": ("binaryvit", _PYRAMID | {"norm": "layer_norm"}),
}


def tiny_config(name: str, num_classes: int = 3, **settings: Any) -> ConfigDict:
    """Returns the configuration of a small model."""
    model, sizes = TINY[name]
    return models.model_config(model, **sizes | settings, num_classes=num_classes)


def abstract_of(config: ConfigDict) -> Variables:
    """Returns the shapes of a model's variables."""
    return abstract_variables(models.create_model(config), config.image_size)


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
