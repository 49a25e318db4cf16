"""Names and layouts: where each array of our trees lives in a PyTorch state dict.

The rules turn the path of an array, ``block0/attention/query/dense/kernel``, into the name that both
Hugging Face's ViT and the BinaryViT reference give it,
``vit.encoder.layer.0.attention.attention.query.weight``.
Only this direction is written down; the way back is the same table read from the names of a model.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

_UNIT_LEAVES = {"query": "q", "key": "k", "value": "v", "reduce": "r"}

# Applied in order to "/"-joined paths; every rule whose pattern occurs rewrites its part.
_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    # ends of the network
    (r"^embedding/patches/", "vit/embeddings/patch_embeddings/projection/"),
    (r"^embedding/class_token$", "vit/embeddings/cls_token"),
    (r"^embedding/positions$", "vit/embeddings/position_embeddings"),
    (r"^embedding/", "vit/embeddings/"),
    (r"^norm/", "vit/layernorm/"),
    (r"^head/", "classifier/"),
    # between stages
    (r"^downsample(\d+)/positions$", r"vit/encoder/patch_embed\1/position_embeddings"),
    (r"^downsample(\d+)/input_norm/", r"vit/encoder/patch_embed\1/norm0/"),
    (r"^downsample(\d+)/conv/kernel$", r"vit/encoder/patch_embed\1/proj/kernel"),
    (r"^downsample(\d+)/", r"vit/encoder/patch_embed\1/"),
    # blocks
    (r"^block(\d+)/", r"vit/encoder/layer/\1/"),
    (r"/attention_norm/", "/layernorm_before/"),
    (r"/mlp_norm/", "/layernorm_after/"),
    (r"/pool_([hw]\d+)/", r"/layerscale_\1/"),
    (r"/attention/(query|key|value)_move$", lambda m: f"/attention/attention/move{_unit(m)}2"),
    (
        r"/attention/(query|key|value|reduce)/dense/move$",
        lambda m: f"/attention/attention/move{_unit(m)}",
    ),
    (r"/attention/reduce/dense/", "/attention/attention/reduction/"),
    (r"/attention/reduce/norm/", "/attention/attention/norm_r/"),
    (r"/attention/(query|key|value)/dense/", r"/attention/attention/\1/"),
    (r"/attention/(query|key|value)/norm/", lambda m: f"/attention/attention/norm{_unit(m)}/"),
    (
        r"/attention/(query|key|value|reduce)/rprelu/",
        lambda m: f"/attention/attention/rprelu{_unit(m)}/",
    ),
    (r"/attention/norm/", "/attention/attention/norm_context/"),
    (r"/attention/rprelu/", "/attention/attention/rprelu_context/"),
    (r"/attention/prob_scale$", "/attention/attention/att_prob_clip"),
    (r"/attention_output/(kernel|bias)$", r"/attention/output/dense/\1"),
    (r"/attention_output/", "/attention/output/"),
    (r"/attention_scale/", "/attention/output/layerscale/"),
    (r"/mlp/expand/", "/intermediate/"),
    (r"/mlp/contract/", "/output/"),
    (r"/mlp_scale/", "/output/layerscale/"),
    # blocks of the real DeiT
    (r"(layer/\d+)/(query|key|value)/", r"\1/attention/attention/\2/"),
    (r"/mlp_in/", "/intermediate/dense/"),
    (r"/mlp_out/", "/output/dense/"),
    # leaves
    (r"/(dense|conv)/move$", "/move"),
    (r"/slope$", "/prelu/weight"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/mean$", "/running_mean"),
    (r"/var$", "/running_var"),
)


def _unit(match: re.Match[str]) -> str:
    return _UNIT_LEAVES[match.group(1)]


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path of a variable tree as ``block0/mlp_norm/scale``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def torch_name(path: str) -> str:
    """Returns the state-dict name of the parameter or running statistic at ``path``."""
    for pattern, replacement in _RULES:
        path = re.sub(pattern, replacement, path)
    return path.replace("/", ".")


def _torch_axes(path: str, ndim: int) -> tuple[int, ...]:
    """Returns our axes in PyTorch's order."""
    if path.endswith("/kernel"):  # (in, out) and (height, width, in, out)
        return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]
    if path.endswith("/move") and ndim == 4:  # (1, 1, 1, channels)
        return (0, 3, 1, 2)
    return tuple(range(ndim))


def to_torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of ours in PyTorch's layout: linear (out, in), images channels first."""
    return array.transpose(_torch_axes(path, array.ndim))


def from_torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Returns an array in PyTorch's layout in ours: the inverse of `to_torch_layout`."""
    return array.transpose(np.argsort(_torch_axes(path, array.ndim)))


def to_state_dict(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns every array of ``params`` and ``batch_stats`` under its PyTorch name and layout."""
    state = {}
    for collection in ("params", "batch_stats"):
        for key_path, array in jax.tree_util.tree_leaves_with_path(variables.get(collection, {})):
            path = path_name(key_path)
            state[torch_name(path)] = to_torch_layout(path, np.asarray(array))
    return state
