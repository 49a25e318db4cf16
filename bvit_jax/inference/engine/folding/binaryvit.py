"""BinaryViT and ReActNet-DeiT, folded for `bvit_jax.inference.engine.binaryvit`."""

import numpy as np

from bvit_jax.binary.weights import CONV, WeightRule
from bvit_jax.inference.engine.binaryvit import STRIDE, stages
from bvit_jax.inference.engine.folding.values import Arrays, Norms, Tree, below, end

UNITS = ("query", "reduce", "key", "value")
TOKENS = ("class_token", "distillation_token")


def fold(config: Tree, params: Tree, statistics: Tree) -> Arrays:
    """Returns the arrays of a model; see `bvit_jax.inference.engine.fold`."""
    norms = Norms.of(config)
    arrays: Arrays = {}
    every = stages(config)
    first = _first_norms(norms, params, statistics, [stage.blocks[0] for stage in every])
    arrays |= below("embedding", embedding(norms, params, statistics, first[0]))
    for number, stage in enumerate(every):
        if number > 0:
            name = f"downsample{number}"
            folded = downsample(norms, params[name], statistics.get(name, {}), CONV, first[number])
            arrays |= below(name, folded)
        for index in stage.blocks:
            if index != stage.blocks[-1]:
                after = norms.norm(
                    params[f"block{index + 1}"], statistics.get(f"block{index + 1}", {}), "attention_norm"
                )
            else:
                after = after_stage(norms, params, statistics, number, len(every))
            name = f"block{index}"
            arrays |= below(name, _block(config, norms, params[name], statistics.get(name, {}), after))
    return arrays | below("head", dict(params["head"]))


def _first_norms(norms: Norms, params: Tree, statistics: Tree, blocks: list[int]) -> list[Arrays]:
    names = [f"block{index}" for index in blocks]
    return [norms.norm(params[name], statistics.get(name, {}), "attention_norm") for name in names]


def after_stage(norms: Norms, params: Tree, statistics: Tree, number: int, stages: int) -> Arrays:
    """Returns the norm that follows the last block of a stage."""
    if number + 1 == stages:
        return norms.norm(params, statistics, "norm")
    name = f"downsample{number + 1}"
    return norms.norm(params[name], statistics.get(name, {}), "input_norm")


def embedding(norms: Norms, params: Tree, statistics: Tree, following: Arrays, gelu: bool = False) -> Arrays:
    """Returns the embedding of images; with ``gelu``, of which positions come after, its bias stays."""
    own = params["embedding"]
    kernel, bias = own["patches"]["kernel"], own["patches"]["bias"]
    kernel = kernel.reshape(-1, kernel.shape[-1])
    arrays = below("norm", following)
    if "norm" in own and norms.folded:
        factor, shift = norms.affine(own, statistics["embedding"], "norm")
        kernel, bias = kernel * factor, bias * factor + shift
    elif "norm" in own:
        arrays |= below("inner", norms.norm(own, {}, "norm"))
    arrays["patches"] = kernel
    tokens = [own[name].reshape(1, -1) for name in TOKENS if name in own]
    if "positions" in own:
        positions = own["positions"].reshape(-1, kernel.shape[-1])
        if tokens:
            arrays["tokens"] = np.concatenate(tokens) + positions[: len(tokens)]
        arrays["positions"] = positions[len(tokens) :]
    if gelu or "inner/factor" in arrays or "positions" not in arrays:
        arrays["bias"] = bias
    else:
        arrays["positions"] = arrays["positions"] + bias
    return arrays


def downsample(norms: Norms, params: Tree, statistics: Tree, rule: WeightRule, following: Arrays) -> Arrays:
    """Returns the patch embedding between stages; its first norm belongs to the stage before."""
    kernel = params["conv"]["kernel"]
    arrays = below("norm", following) | {"positions": params["positions"].reshape(-1, kernel.shape[-1])}
    if "rprelu" in params:
        return arrays | below("unit", norms.unit(params, statistics, "conv", rule, STRIDE**2))
    kernel = kernel.reshape(-1, kernel.shape[-1])
    if not norms.folded:
        return arrays | {"kernel": kernel} | below("inner", norms.norm(params, {}, "norm"))
    factor, shift = norms.affine(params, statistics, "norm")
    return arrays | {"kernel": kernel * factor, "positions": arrays["positions"] + shift}


def _block(config: Tree, norms: Norms, params: Tree, statistics: Tree, after: Arrays) -> Arrays:
    attention, own = params["attention"], statistics.get("attention", {})
    units = {name: norms.unit(attention[name], own.get(name, {})) for name in UNITS if name in attention}
    taps, moves = pooling_taps(config["pool_branches"], params)
    middle = norms.norm(params, statistics, "mlp_norm")
    arrays = {f"attention/{name}/{key}": array for name, unit in units.items() for key, array in unit.items()}
    arrays["attention/moves"] = np.stack([attention[f"{name}_move"] for name in ("query", "key", "value")])
    # Without a floor in the settings, a scale below 0 stays: its head attends to nothing.
    floor = config["prob_scale_floor"]
    scale = np.maximum(attention["prob_scale"], floor) if floor else attention["prob_scale"]
    arrays["attention/scale"] = scale
    arrays |= below("attention/norm", norms.following(attention, own, scale))
    output = norms.unit(params["attention_output"], statistics.get("attention_output", {}))
    arrays |= below("attention_output", output)
    arrays |= below("attention_end", end(params.get("attention_scale"), 0.0, middle))
    arrays |= feed_forward(norms, params, statistics)
    if len(taps):
        arrays["taps"] = taps
    return arrays | below("mlp_end", end(params.get("mlp_scale"), moves, after))


def feed_forward(norms: Norms, params: Tree, statistics: Tree) -> Arrays:
    """Returns the units of a block's feed-forward branch."""
    own = statistics.get("mlp", {})
    units = {name: norms.unit(params["mlp"][name], own.get(name, {})) for name in ("expand", "contract")}
    return {f"mlp/{name}/{key}": array for name, unit in units.items() for key, array in unit.items()}


def pooling_taps(sizes: tuple[int, ...], params: Tree) -> tuple[np.ndarray, np.ndarray | float]:
    """Returns the taps of a block's pooling branches, none without any, and the sum of their shifts."""
    reach = max(sizes, default=1) // 2
    scales = {(size, axis): params[f"pool_{axis}{size}"] for size in sizes for axis in "hw"}
    if not scales:
        return np.zeros((0, 0)), 0.0
    width = next(iter(scales.values()))["alpha"].shape
    taps = np.zeros((1 + 2 * reach, *width))
    for (size, axis), scale in scales.items():
        first = 1 if axis == "h" else 1 + reach
        taps[0] += scale["alpha"] / size
        taps[first : first + size // 2] += scale["alpha"] / size
    return taps, np.sum([scale["move"] for scale in scales.values()], axis=0)
