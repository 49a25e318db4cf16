"""Both forms of Bi-ViT, folded for `bvit_jax.inference.engine.bivit`."""

from collections.abc import Mapping

import numpy as np

from bvit_jax.binary.weights import BITS, CONV, WeightRule
from bvit_jax.inference.engine.bivit import is_bit
from bvit_jax.inference.engine.folding.binaryvit import embedding
from bvit_jax.inference.engine.folding.values import Arrays, Norms, Tree, below, product, scale_of
from bvit_jax.models.bivit.paper import LEAST_SCALE

DENSE_LAYERS = ("query", "key", "value", "attention_output", "mlp_in", "mlp_out")


def fold(config: Tree, params: Tree, statistics: Tree) -> Arrays:
    """Returns the arrays of a model; see `bvit_jax.inference.engine.fold`."""
    del statistics  # only flags
    norms = Norms(folded=False, epsilon=config["norm_epsilon"])
    rule = BITS if is_bit(config) else CONV
    arrays: Arrays = below("embedding", embedding(norms, params, {}, {}))
    for name, module in params.items():
        if "block" in name:
            arrays |= below(name, _block(module, rule))
        elif name.startswith("downsample"):
            reduction = _reduction(module["reduction"], rule)
            arrays |= below(name, below("reduction", reduction) | _norm(module, "norm"))
        elif name.endswith("head"):
            arrays |= below(name, dict(module))
    return arrays | _norm(params, "norm")


def _block(params: Tree, rule: WeightRule) -> Arrays:
    arrays: Arrays = {}
    for name, module in params.items():
        if name.endswith("_norm"):
            arrays |= _norm(params, name)
        elif name in DENSE_LAYERS:
            kernel = module["kernel"]
            arrays |= below(name, _codes(kernel, rule) | {"scale": scale_of(kernel)})
        elif isinstance(module, Mapping):
            arrays |= below(name, dict(module))
        else:
            arrays[name] = module
    if "prob_act/scale" in arrays:
        arrays["prob_act/scale"] = np.maximum(arrays["prob_act/scale"], LEAST_SCALE)
    return arrays


def _reduction(params: Tree, rule: WeightRule) -> Arrays:
    if rule == BITS:
        return _codes(params["kernel"], rule) | {"scale": params["scale"]}
    arrays = _codes(params["kernel"] / params["alpha"], rule)
    return arrays | {"scale": params["alpha"]} | dict(params["act"])


def _codes(kernel: np.ndarray, rule: WeightRule) -> Arrays:
    arrays = product(kernel, np.zeros(0), rule)
    del arrays["move"]  # there is none
    return arrays


def _norm(params: Tree, name: str) -> Arrays:
    return {f"{name}/factor": params[name]["scale"], f"{name}/shift": params[name]["bias"]}
