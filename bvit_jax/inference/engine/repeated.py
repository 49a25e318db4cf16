"""Blocks that are alike, compiled once: as the body of a loop over their stacked arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from bvit_jax.inference.engine.parameters import Parameters

Step = Callable[[Parameters, Any], Any]


def stack(arrays: Mapping[str, Any], runs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Returns arrays in which those of blocks that are alike are stacked along a new first axis.

    Args:
      arrays: of a model, by name.
      runs: the names of blocks that follow each other. They are alike if their arrays have the same names
        and shapes; a run with a zero weight in one block and none in another is left as it is.
    """
    found = dict(arrays)
    for names in runs:
        blocks = [_below(arrays, name) for name in names]
        shapes = [{key: (array.shape, array.dtype) for key, array in block.items()} for block in blocks]
        if len(names) > 1 and all(shape == shapes[0] for shape in shapes):
            for key in blocks[0]:
                found[f"{_joined(names)}/{key}"] = jnp.stack([block[key] for block in blocks])
                for name in names:
                    del found[f"{name}/{key}"]
    return found


def run(p: Parameters, names: Sequence[str], step: Step, carry: Any) -> Any:
    """Returns the result of ``carry = step(arrays of a block, carry)`` for each block in turn."""
    stacked = _below(p.arrays, p.prefix + _joined(names))
    if stacked:
        return lax.scan(lambda carry, arrays: (step(Parameters(arrays), carry), None), carry, stacked)[0]
    for name in names:
        carry = step(p.at(name), carry)
    return carry


def _joined(names: Sequence[str]) -> str:
    return f"{names[0]}-{names[-1]}"


def _below(arrays: Mapping[str, Any], name: str) -> dict[str, Any]:
    start = f"{name}/"
    return {key.removeprefix(start): array for key, array in arrays.items() if key.startswith(start)}
