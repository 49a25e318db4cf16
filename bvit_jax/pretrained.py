"""Weights from PyTorch-named files: state dicts, safetensors, Hugging Face directories."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from bvit_jax import models
from bvit_jax.errors import UserError, nearest
from bvit_jax.torch_names import from_torch_layout, path_name, to_state_dict, to_torch_layout, torch_name

Variables = dict[str, Any]

# Buffers of the PyTorch code that say nothing about the function: a counter that PyTorch does not use
# with a fixed momentum, and the constants of config.model.clip_val.
BUFFERS = ("num_batches_tracked", "weight_clip_val", "act_clip_val")


def abstract_variables(model: nn.Module, image_size: int) -> Variables:
    """Returns the shapes and dtypes of a model's variables, without computing anything."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def from_state_dict(
    state: Mapping[str, np.ndarray], abstract: Variables, dtype: np.dtype | type = np.float32
) -> Variables:
    """Returns the variables that a PyTorch-named state dict holds.

    Args:
      state: arrays in PyTorch's names and layouts.
      abstract: the variables expected, from `abstract_variables`.
      dtype: dtype of the result.

    Raises:
      UserError: arrays are missing, unexpected or of another shape; the message names the first.
    """
    expected = {
        torch_name(path_name(path))
        for tree in abstract.values()
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }
    arrays = {name: a for name, a in state.items() if name.rpartition(".")[2] not in BUFFERS}
    missing, unexpected = sorted(expected - arrays.keys()), sorted(arrays.keys() - expected)
    if missing:
        raise UserError(
            f"{len(missing)} arrays of the model are not in the file, the first is {missing[0]!r}"
            + (nearest(missing[0], unexpected) if unexpected else "")
        )
    if unexpected:
        raise UserError(
            f"{len(unexpected)} arrays of the file are not in the model, "
            f"the first is {unexpected[0]!r}; is it a checkpoint of another model?"
        )

    def convert(key_path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = path_name(key_path)
        name = torch_name(path)
        array = np.asarray(arrays[name])
        expected_shape = to_torch_layout(path, np.empty(leaf.shape, np.bool_)).shape
        if array.shape != expected_shape:
            raise UserError(
                f"{name!r} has shape {array.shape}; the model expects {expected_shape}:"
                " is it a checkpoint of another model?"
            )
        array = from_torch_layout(path, array)
        return np.array(array, dtype, order="C")

    return {
        collection: jax.tree_util.tree_map_with_path(convert, tree) for collection, tree in abstract.items()
    }


# --- Hugging Face directories ------------------------------------------------------------------

_HF_KEYS = {  # config.json of Hugging Face's ViT -> config.model of our DeiT
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "layer_norm_eps": "norm_epsilon",
}


def load_pretrained(directory: Path) -> tuple[ConfigDict, Variables]:
    """Reads a directory with ``config.json`` and ``model.safetensors`` in Hugging Face's ViT format.

    Returns:
      The model's configuration and its float32 variables.

    Raises:
      UserError: a file is missing, damaged, or describes something else than a ViT classifier.
    """
    config_path, weights_path = directory / "config.json", directory / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(
                f"no {path.name} in {directory}; expected a directory with config.json and "
                "model.safetensors in the names of Hugging Face's ViT"
            )
    try:
        values = json.loads(config_path.read_text())
        config = _model_config_from_hf(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config_path} is not the config.json of a ViT: {error!r}") from error
    try:
        state = load_file(weights_path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read {weights_path}: {error}; is the file complete?") from error
    model = models.create_model(config)
    try:
        return config, from_state_dict(state, abstract_variables(model, config.image_size))
    except UserError as error:
        raise UserError(f"{weights_path}: {error}") from error


def _model_config_from_hf(values: dict[str, Any]) -> ConfigDict:
    if values.get("model_type") != "vit":
        raise ValueError(f"model_type is {values.get('model_type')!r}, expected 'vit'")
    for key, expected in (("hidden_act", "gelu"), ("qkv_bias", True), ("num_channels", 3)):
        if values.get(key, expected) != expected:
            raise ValueError(f"{key} is {values[key]!r}, only {expected!r} is supported")
    settings = {ours: values[theirs] for theirs, ours in _HF_KEYS.items()}
    return models.model_config("deit", **settings, num_classes=len(values["id2label"]))


def save_pretrained(
    directory: Path, config: ConfigDict, variables: Variables, class_names: list[str]
) -> None:
    """Writes a real-valued DeiT as `load_pretrained` reads it; each file appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        **{theirs: config[ours] for theirs, ours in _HF_KEYS.items()},
        "hidden_act": "gelu",
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "label2id": {name: i for i, name in enumerate(class_names)},
    }
    state = {name: np.array(a, order="C") for name, a in to_state_dict(variables).items()}
    weights = directory / "model.safetensors.partial"
    weights.write_bytes(save(state, metadata={"format": "pt"}))
    weights.rename(directory / "model.safetensors")
    text = directory / "config.json.partial"
    text.write_text(json.dumps(values, indent=2) + "\n")
    text.rename(directory / "config.json")
