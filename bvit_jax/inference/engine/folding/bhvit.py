"""BHViT, folded for `bvit_jax.inference.engine.bhvit`."""

import numpy as np

from bvit_jax.binary.gsb import FLOOR
from bvit_jax.binary.weights import DENSE
from bvit_jax.inference.engine.bhvit import DILATIONS, stages
from bvit_jax.inference.engine.folding.binaryvit import after_stage, downsample, embedding, feed_forward
from bvit_jax.inference.engine.folding.values import Arrays, Norms, Tree, below, end, product, scale_of

QKV = ("query", "key", "value")


def fold(config: Tree, params: Tree, statistics: Tree) -> Arrays:
    """Returns the arrays of a model; see `bvit_jax.inference.engine.fold`."""
    norms = Norms.of(config)
    arrays: Arrays = below("head", dict(params["head"]))
    every = stages(config)
    for number, stage in enumerate(every):
        first = "attention_norm" if stage.num_heads else "mixer_norm"
        before = {
            index: norms.norm(params[f"block{index}"], statistics.get(f"block{index}", {}), first)
            for index in stage.blocks
        }
        start = before[stage.blocks[0]]
        if number == 0:
            arrays |= below("embedding", embedding(norms, params, statistics, start, gelu=True))
        else:
            name = f"downsample{number}"
            arrays |= below(name, downsample(norms, params[name], statistics.get(name, {}), DENSE, start))
        for index in stage.blocks:
            after = before.get(index + 1) or after_stage(norms, params, statistics, number, len(every))
            name, own = f"block{index}", statistics.get(f"block{index}", {})
            arrays |= below(name, _block(config, norms, params[name], own, after, stage.num_heads))
    return arrays


def _block(
    config: Tree, norms: Norms, params: Tree, statistics: Tree, after: Arrays, num_heads: int
) -> Arrays:
    middle = norms.norm(params, statistics, "mlp_norm")
    arrays = feed_forward(norms, params, statistics)
    if num_heads:
        attention = _attention(config, norms, params["attention"], statistics.get("attention", {}))
        output = norms.unit(params["attention_output"], statistics.get("attention_output", {}))
        arrays |= below("attention", attention) | below("attention_output", output)
        arrays |= below("attention_end", end(params.get("attention_scale"), 0.0, middle))
    else:
        arrays |= below("mixer", _mixer(norms, params["mixer"], statistics.get("mixer", {})))
        arrays |= below("mlp_norm", middle)
    taps, moves = _shift_taps(config["shift_branches"], params)
    if len(taps):
        arrays["taps"] = taps
    return arrays | below("mlp_end", end(params.get("mlp_scale"), moves, after))


def _mixer(norms: Norms, params: Tree, statistics: Tree) -> Arrays:
    arrays = below("norm", norms.norm(params, statistics, "norm")) | {"move": params["move"].ravel()}
    for i in range(1, 1 + len(DILATIONS)):
        conv, rprelu = params[f"conv{i}"], params[f"rprelu{i}"]
        packed = product(conv["kernel"], np.zeros(0), DENSE)
        del packed["move"]  # which the convolutions share
        packed |= {
            "factor": scale_of(conv["kernel"]),
            "shift": conv["bias"] - rprelu["move1"],
            "slope": rprelu["slope"],
            "move2": rprelu["move2"],
        }
        arrays |= below(f"conv{i}", packed)
    return arrays


def _attention(config: Tree, norms: Norms, params: Tree, statistics: Tree) -> Arrays:
    arrays: Arrays = {"share": params["share"].ravel()}
    arrays["tokens/share"] = params["tokens"]["share"].ravel()
    tokens = params["tokens"]["norm"]
    arrays |= {"tokens/norm/factor": tokens["scale"], "tokens/norm/shift": tokens["bias"]}
    for name in QKV:
        arrays |= below(name, norms.unit(params[name], statistics.get(name, {})))
    arrays["moves"] = np.stack([params[f"{name}_move"] for name in QKV])
    if config["gsb"]:
        scale = np.maximum(params["prob_scale"], FLOOR)
        arrays |= {"scale": params["prob_scale"], "floored": scale}
        arrays |= {
            name: np.maximum(params[key], FLOOR)
            for name, key in (("second", "prob_scale2"), ("third", "prob_scale3"))
        }
    else:
        step = params["prob_act"]["alpha"]
        arrays |= {"step": step, "zero_point": params["prob_act"]["zero_point"]}
        scale = np.repeat(step, arrays["share"].size // step.size)
    return arrays | below("norm", norms.following(params, statistics, scale))


def _shift_taps(sizes: tuple[int, ...], params: Tree) -> tuple[np.ndarray, np.ndarray | float]:
    """Returns the taps of a block's shift branches, none without any, and the sum of their shifts."""
    if not sizes:
        return np.zeros((0, 0)), 0.0
    reach = max(sizes) // 2
    width = params[f"shift_h{sizes[0]}"]["alpha"].size
    taps, moves = np.zeros((1 + 4 * reach, width)), np.zeros(width)
    quarters = np.array_split(np.arange(width), 4)
    for size in sizes:
        scales = {axis: params[f"shift_{axis}{size}"] for axis in ("h", "w", "ch")}
        for axis, sides in (("h", (0, 1)), ("w", (2, 3))):
            alpha = scales[axis]["alpha"] / size
            taps[0] += alpha
            for side in sides:
                taps[side * reach + 1 : side * reach + 1 + size // 2] += alpha
        for side, quarter in enumerate(quarters):
            taps[side * reach + size // 2, quarter] += scales["ch"]["alpha"][quarter]
        moves += sum(scale["move"] for scale in scales.values())
    return taps, moves
