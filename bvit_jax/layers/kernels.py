"""The weights of one bit: which they are, their signs packed into bits, and how many of them flipped."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax

from bvit_jax.binary.products import WeightRule

Path = tuple[str, ...]
Kernels = Mapping[Path, WeightRule]
Signs = Any


@contextlib.contextmanager
def noted_kernels() -> Iterator[dict[Path, WeightRule]]:
    """Notes every layer with a kernel of one bit that a model calls within the context.

    Such a layer has the `WeightRule` of its kernel as ``rule`` and ``weight_bits`` 1.

    Yields:
      The rule of each kernel by the path of its layer, to be read after ``model.init`` or ``model.apply``.
    """
    kernels: dict[Path, WeightRule] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        rule = getattr(module, "rule", None)
        if isinstance(rule, WeightRule) and context.method_name == "__call__" and module.weight_bits == 1:
            kernels[module.path] = rule
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        yield kernels


def pack_signs(params: Any, kernels: Kernels) -> Signs:
    """Returns the signs of the kernels of one bit, packed, as a tree like the parameters.

    The sign is that of the quantiser, for a linear kernel of the centred weights. Its zero, which a
    weight exactly at its row's mean gets, counts as negative here: there is one bit.

    Returns:
      uint8 [ceil(size / 8)] for every kernel, in the place of its layer's parameters.
    """
    packed = {path: jnp.packbits(rule.codes(_kernel(params, path)) > 0) for path, rule in kernels.items()}
    return unflatten_dict(packed)


def flipped(signs: Signs, params: Any, kernels: Kernels) -> dict[str, Array]:
    """Returns the share of each kernel of one bit whose sign is not that of ``signs``, float32 ()."""
    before, after = flatten_dict(signs), flatten_dict(pack_signs(params, kernels))
    return {
        "/".join(path): _share(lax.population_count(before[path] ^ after[path]), _kernel(params, path))
        for path in kernels
    }


def active_weights(params: Any, kernels: Kernels) -> dict[str, Array]:
    """Returns the share of each kernel of one bit that its quantiser gives a gradient, float32 ()."""
    shares = {}
    for path, rule in kernels.items():
        kernel = _kernel(params, path)
        shares["/".join(path)] = _share(rule.window(kernel), kernel)
    return shares


def _share(counts: Array, kernel: Array) -> Array:
    return jnp.sum(counts, dtype=jnp.int32).astype(jnp.float32) / kernel.size


def _kernel(params: Any, path: Path) -> Array:
    return functools.reduce(lambda tree, name: tree[name], path, params)["kernel"]
