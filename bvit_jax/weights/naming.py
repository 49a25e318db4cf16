"""Names and layouts: where each array of our trees is in a PyTorch state dict.

Rules turn the path of an array, ``block0/attention/query/dense/kernel``, into a name such as
``vit.encoder.layer.0.attention.attention.query.weight``. Only this direction is written down; the other is
found by applying it to all arrays of a model. If a file stacks several arrays in one, as
``blocks.0.attn.qkv.weight`` does, their paths have the same name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


@dataclass(frozen=True)
class Naming:
    """How one family of files names the arrays of one kind of model.

    Attributes:
      rules: (pattern, replacement), applied in order to "/"-joined paths.
      bookkeeping: last parts of the names of arrays that do not affect the function: counters that
        PyTorch does not use, and constants that follow from the configuration.
      unused: pattern of the names of arrays that PyTorch's modules own but never read; "" for none.
    """

    rules: Rules
    bookkeeping: tuple[str, ...] = ()
    unused: str = ""

    def name(self, path: str) -> str:
        """Returns the state-dict name of the parameter or running statistic at ``path``."""
        for pattern, replacement in self.rules:
            path = re.sub(pattern, replacement, path)
        return path.replace("/", ".")

    def is_bookkeeping(self, name: str) -> bool:
        """Returns whether an array of a file does not affect the function."""
        return name.rpartition(".")[2] in self.bookkeeping or self.is_unused(name)

    def is_unused(self, name: str) -> bool:
        """Returns whether PyTorch's modules own an array but never read it, so that it may have any value."""
        return bool(self.unused) and re.search(self.unused, name) is not None


_UNIT_LEAVES = {"query": "q", "key": "k", "value": "v", "reduce": "r"}


def _unit(match: re.Match[str]) -> str:
    return _UNIT_LEAVES[match.group(1)]


def _minus_one(match: re.Match[str]) -> str:
    return str(int(match.group(1)) - 1)


_LEAVES: Rules = (
    (r"/(dense|conv)/move$", "/move"),
    (r"/slope$", "/prelu/weight"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/mean$", "/running_mean"),
    (r"/var$", "/running_var"),
)

# The BinaryViT reference and Hugging Face's ViT, from which it descends.
_VIT: Rules = (
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
    *_LEAVES,
)

# BHViT's code, which descends from that of BinaryViT.
_BHVIT: Rules = (
    (r"^embedding/patches/", "vit/embeddings/patch_embeddings/proj/"),
    (r"^embedding/norm/", "vit/embeddings/patch_embeddings/norm/"),
    (r"/mixer_norm/", "/layernorm_before/"),
    (r"/mixer/move$", "/GC/move/bias"),
    (r"/mixer/conv(\d)/", r"/GC/cov\1/"),
    (r"/mixer/rprelu(\d)/", r"/GC/act\1/"),
    (r"/mixer/norm/", "/GC/norm/"),
    (r"/attention/tokens/share$", "/attention/attention/token_FA/a1"),
    (r"/attention/tokens/norm/", "/attention/attention/token_FA/norm/"),
    (r"/attention/prob_act/", "/attention/attention/att_prob_quantizer/"),
    (r"/attention/prob_scale([23])$", r"/attention/attention/att_prob_clip\1"),
    (r"/attention/share$", "/attention/attention/parm"),
    (r"/shift_(\w+)/", r"/layerscale_\1/"),
    *_VIT,
)

_DEIT: Rules = (
    (r"^embedding/distillation_token$", "vit/embeddings/distillation_token"),
    *_VIT,
    (r"^vit/", "deit/"),
)

_DEIT_HEADS: Rules = (
    (r"^head/", "cls_classifier/"),
    (r"^distillation_head/", "distillation_classifier/"),
    *_DEIT,
)

_HUGGING_FACE_SWIN: Rules = (
    (r"^embedding/patches/", "swin/embeddings/patch_embeddings/projection/"),
    (r"^embedding/", "swin/embeddings/"),
    (r"^norm/", "swin/layernorm/"),
    (r"^head/", "classifier/"),
    (r"^downsample(\d+)/", lambda m: f"swin/encoder/layers/{_minus_one(m)}/downsample/"),
    (r"^stage(\d+)_block(\d+)/", r"swin/encoder/layers/\1/blocks/\2/"),
    (r"/attention_norm/", "/layernorm_before/"),
    (r"/mlp_norm/", "/layernorm_after/"),
    (r"/(query|key|value)/", r"/attention/self/\1/"),
    (r"/position_bias$", "/attention/self/relative_position_bias_table"),
    (r"/attention_output/", "/attention/output/dense/"),
    (r"/mlp_in/", "/intermediate/dense/"),
    (r"/mlp_out/", "/output/dense/"),
    *_LEAVES,
)

# Within a block, timm's names are also Facebook's and Microsoft's.
_TIMM_BLOCK: Rules = (
    (r"/attention_norm/", "/norm1/"),
    (r"/mlp_norm/", "/norm2/"),
    (r"/(query|key|value)/", "/attn/qkv/"),
    (r"/position_bias$", "/attn/relative_position_bias_table"),
    (r"/attention_output/", "/attn/proj/"),
    (r"/mlp_in/", "/mlp/fc1/"),
    (r"/mlp_out/", "/mlp/fc2/"),
    *_LEAVES,
)

_TIMM_DEIT: Rules = (
    (r"^embedding/patches/", "patch_embed/proj/"),
    (r"^embedding/class_token$", "cls_token"),
    (r"^embedding/distillation_token$", "dist_token"),
    (r"^embedding/positions$", "pos_embed"),
    (r"^distillation_head/", "head_dist/"),
    (r"^block(\d+)/", r"blocks/\1/"),
    *_TIMM_BLOCK,
)

_MICROSOFT_SWIN: Rules = (
    (r"^embedding/patches/", "patch_embed/proj/"),
    (r"^embedding/norm/", "patch_embed/norm/"),
    (r"^downsample(\d+)/", lambda m: f"layers/{_minus_one(m)}/downsample/"),
    (r"^stage(\d+)_block(\d+)/", r"layers/\1/blocks/\2/"),
    *_TIMM_BLOCK,
)

_TIMM_SWIN: Rules = (
    (r"^downsample(\d+)/", r"layers/\1/downsample/"),
    (r"^head/", "head/fc/"),
    *_MICROSOFT_SWIN,
)

# Bi-ViT's code adds to the names of its backbones.
_BIVIT_LETTERS = {"query": "q", "key": "k", "value": "v", "prob": "attn"}
_BIVIT_ATTENTION: Rules = (
    (r"/(query|key)_norm/", lambda m: f"/attn/norm_{_BIVIT_LETTERS[m.group(1)]}/"),
    (r"/(query|key|value|prob)_act/", lambda m: f"/attn/{_BIVIT_LETTERS[m.group(1)]}_act/"),
)
_BIVIT_UNUSED = r"\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.bias$"

_WINDOW_CONSTANTS = ("relative_position_index", "attn_mask")

REFERENCE = Naming(_VIT, ("num_batches_tracked", "weight_clip_val", "act_clip_val"))
HUGGING_FACE_VIT = Naming(_VIT)
HUGGING_FACE_DEIT = Naming(_DEIT)
HUGGING_FACE_DEIT_HEADS = Naming(_DEIT_HEADS)
HUGGING_FACE_SWIN = Naming(_HUGGING_FACE_SWIN, _WINDOW_CONSTANTS)
TIMM_DEIT = Naming(_TIMM_DEIT)
TIMM_SWIN = Naming(_TIMM_SWIN, _WINDOW_CONSTANTS)
MICROSOFT_SWIN = Naming(_MICROSOFT_SWIN, _WINDOW_CONSTANTS)
BIVIT_DEIT = Naming((*_BIVIT_ATTENTION, *_TIMM_DEIT), (), _BIVIT_UNUSED)
BIVIT_SWIN = Naming((*_BIVIT_ATTENTION, *_MICROSOFT_SWIN), _WINDOW_CONSTANTS, _BIVIT_UNUSED)


def bhvit_naming(mixers: int) -> Naming:
    """Returns the names of BHViT's code, which numbers the first ``mixers`` blocks and the others apart."""

    def block(match: re.Match[str]) -> str:
        number = int(match.group(1))
        own = f"A/{number}" if number < mixers else f"B/{number - mixers}"
        return f"vit/encoder/layer{own}/"

    return Naming(((r"^block(\d+)/", block), *_BHVIT), REFERENCE.bookkeeping)


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path of a variable tree as ``block0/mlp_norm/scale``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _torch_axes(path: str, ndim: int) -> tuple[int, ...]:
    """Returns our axes in PyTorch's order."""
    if path.endswith("/kernel"):  # (in, out) and (height, width, in, out)
        return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]
    if ndim == 4:  # (1, height, width, channels)
        return (0, 3, 1, 2)
    return tuple(range(ndim))


def to_torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of ours in PyTorch's layout: linear (out, in), images channels first."""
    return array.transpose(_torch_axes(path, array.ndim))


def from_torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Returns an array in PyTorch's layout in ours: the inverse of `to_torch_layout`."""
    return array.transpose(np.argsort(_torch_axes(path, array.ndim)))
