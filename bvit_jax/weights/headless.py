"""Backbones without a classifier: DINO, MAE, timm's ``num_classes=0``, Hugging Face's ``ViTModel``."""

import dataclasses

import numpy as np

from bvit_jax.weights.raw_checkpoint import RawCheckpoint

HUGGING_FACE = ("vit", "deit", "swin")
POOLER = "pooler."  # of Hugging Face's bare models, in place of a classifier


def with_head(raw: RawCheckpoint, num_classes: int) -> tuple[RawCheckpoint, list[str]]:
    """Returns a checkpoint with a classifier of zeros where it has none, and the arrays left out for it."""
    state, left_out = dict(raw.state), []
    kind = raw.values.get("model_type")
    if kind in HUGGING_FACE and "layernorm.weight" in state:
        left_out = sorted(name for name in state if name.startswith(POOLER))
        state = {f"{kind}.{name}": array for name, array in state.items() if name not in left_out}
    if "norm.weight" in state:
        timm_swin = any(name.startswith("layers.") for name in state) and not any(
            name.startswith("layers.0.downsample") for name in state
        )
        heads = ["head.fc" if timm_swin else "head", *(["head_dist"] if "dist_token" in state else [])]
        width = state["norm.weight"].shape[0]
    else:
        norms = [state[name] for k in HUGGING_FACE if (name := f"{k}.layernorm.weight") in state]
        if not norms or "cls_classifier.weight" in state:
            return raw, []
        heads, width = ["classifier"], norms[0].shape[0]
    for head in heads:
        state.setdefault(f"{head}.weight", np.zeros((num_classes, width), np.float32))
        state.setdefault(f"{head}.bias", np.zeros(num_classes, np.float32))
    return dataclasses.replace(raw, state=state), left_out
