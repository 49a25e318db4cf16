"""The kernels of one bit in a model: their signs packed into bits, and the share of them that flipped."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax
from jaxtyping import Float32

from bvit_jax.binary.weights import WeightRule

Path = tuple[str, ...]
Kernels = Mapping[Path, WeightRule]
Signs = Any


@contextlib.contextmanager
def noted_kernels() -> Iterator[dict[Path, WeightRule]]:
    """Collects the layers with a kernel of one bit that a model calls within the context.

    Such a layer has the `WeightRule` of its kernel as ``rule``, and ``weight_bits`` 1 if it has that
    attribute.

    Yields:
      The rule of each kernel by the path of its layer, complete after ``model.init`` or ``model.apply``.
    """
    kernels: dict[Path, WeightRule] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        rule, weight_bits = getattr(module, "rule", None), getattr(module, "weight_bits", 1)
        if isinstance(rule, WeightRule) and weight_bits == 1 and context.method_name == "__call__":
            kernels[module.path] = rule
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        yield kernels


def pack_signs(params: Any, kernels: Kernels) -> Signs:
    """Returns the signs of the kernels of one bit, packed, as a tree like the parameters.

    The sign is that of the kernel's rule, for a linear kernel of the centred weights. A bit has no zero: a
    code of 0, which a weight exactly at its row's mean gets, counts as negative.

    Returns:
      For each kernel uint8 (ceil(size / 8),), in the place of its layer's parameters.
    """
    packed = {path: jnp.packbits(rule.codes(_kernel(params, path)) > 0) for path, rule in kernels.items()}
    return unflatten_dict(packed)


def flipped(signs: Signs, params: Any, kernels: Kernels) -> dict[str, Float32[Array, ""]]:
    """Returns for each kernel of one bit the share of signs that differ from ``signs``."""
    before, after = flatten_dict(signs), flatten_dict(pack_signs(params, kernels))
    return {
        "/".join(path): _share(lax.population_count(before[path] ^ after[path]), _kernel(params, path))
        for path in kernels
    }


def active_weights(params: Any, kernels: Kernels) -> dict[str, Float32[Array, ""]]:
    """Returns for each kernel of one bit the share of weights that its rule gives a gradient."""
    shares = {}
    for path, rule in kernels.items():
        kernel = _kernel(params, path)
        shares["/".join(path)] = _share(rule.window(kernel), kernel)
    return shares


def _share(counts: Array, kernel: Array) -> Array:
    return jnp.sum(counts, dtype=jnp.int32).astype(jnp.float32) / kernel.size


def _kernel(params: Any, path: Path) -> Array:
    return functools.reduce(lambda tree, name: tree[name], path, params)["kernel"]
