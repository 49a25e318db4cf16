"""The operations of the engine as compiled code, on a CPU where the package bvit_kernels is installed.

The package, ``kernels/`` of the repository, registers a target of XLA's foreign function interface for each
of them. What they compute is what XLA's operations do: the same integers, and the same real numbers up to the
order of their sums. The targets trust their arguments, so that all shapes are checked here.
"""

import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bvit_jax.binary.bits import WORD
from bvit_jax.inference.engine import operations
from bvit_jax.inference.engine.levels import XLA, Operations
from bvit_jax.inference.engine.operations import Context, End, Product, Unit

PACKAGE = "bvit_kernels"
REACH = 2  # of the compiled stencil


def best() -> Operations:
    """Returns the fastest operations that can run here."""
    return COMPILED if available() else XLA


@functools.cache
def available() -> bool:
    """Returns whether compiled code can run here; warns once where it is installed and cannot."""
    if jax.default_backend() != "cpu" or importlib.util.find_spec(PACKAGE) is None:
        return False
    try:
        importlib.import_module(PACKAGE)
    except ImportError as error:
        warnings.warn(f"{error}; packed models run without it, slower", stacklevel=2)
        return False
    return True


def _count(x: Array, product: Product, *, bit: bool = False) -> Array:
    outputs = _require_product(product, x.shape[-1])
    return _call("count", [(*x.shape[:-1], outputs)], x, *product, bit=bit)[0]


def _unit(x: Array, u: Unit, shortcut: Array) -> Array:
    shape = (*x.shape[:-1], _require_unit(u, x.shape[-1]))
    _require_shortcut(shortcut, shape)
    return _call("unit", [shape], x, *u.product, *u[1:], shortcut)[0]


def _unit_end(x: Array, u: Unit, shortcut: Array, residual: Array, end: End) -> tuple[Array, Array]:
    shape = (*x.shape[:-1], _require_unit(u, x.shape[-1]))
    _require_shortcut(shortcut, shape)
    _require(shape, residual)
    _require(shape[-1:], *end)
    r, n = _call("unit_end", [shape] * 2, x, *u.product, *u[1:], shortcut, residual, *end)
    return r, n


def _feed_forward(x: Array, expand: Unit, contract: Unit, residual: Array, end: End) -> tuple[Array, Array]:
    channels = x.shape[-1]
    if _require_unit(contract, _require_unit(expand, channels)) != channels:
        raise ValueError(f"a branch of {channels} channels ends in {contract.factor.shape[0]}")
    _require(x.shape, residual)
    _require((channels,), *end)
    units = (*expand.product, *expand[1:], *contract.product, *contract[1:])
    r, n = _call("feed_forward", [x.shape] * 2, x, *units, residual, *end)
    return r, n


def _attention(
    q: Array, k: Array, v: Array, moves: Array, norm: Context, scale: Array, num_heads: int, reduction: int
) -> Array:
    images, tokens, channels = q.shape
    _require((images, tokens // reduction**2, channels), k, v)
    _require((3, channels), moves)
    _require((channels,), *norm)
    _require((), scale)
    if channels % num_heads or (reduction > 1 and _side(tokens) % reduction):
        raise ValueError(f"{num_heads} heads and reduction {reduction} do not fit queries {q.shape}")
    sizes = {"heads": np.int64(num_heads), "reduction": np.int64(reduction)}
    return _call("attention", [q.shape], q, k, v, moves, *norm, scale, **sizes)[0]


def _average_pool(x: Array, size: int) -> Array:
    images, tokens, channels = x.shape
    side = _side(tokens)
    sizes = {"side": np.int64(side), "size": np.int64(size)}
    return _call("pool", [(images, (side // size) ** 2, channels)], x, **sizes)[0]


def _downsample(n: Array, u: Unit, positions: Array, factor: Array, shift: Array) -> tuple[Array, Array]:
    images, tokens, channels = n.shape
    side, outputs = _side(tokens), _require_unit(u, 4 * channels)
    shape = (images, (side // 2) ** 2, outputs)
    _require_shortcut(n[:, : shape[1]], shape)
    _require(shape[1:], positions)
    _require((outputs,), factor, shift)
    arrays = (n, *u.product, *u[1:], positions, factor, shift)
    x, n = _call("downsample", [shape] * 2, *arrays, side=np.int64(side))
    return x, n


def _branches(n: Array, x: Array, taps: Array) -> Array:
    reach = taps.shape[0] // 2
    if reach > REACH:
        return operations.branches(n, x, taps)
    _require(n.shape, x)
    _require((1 + 2 * reach, n.shape[-1]), taps)
    missing = ((0, REACH - reach), (0, 0))
    of_axes = (jnp.pad(of_axis, missing) for of_axis in (taps[1 : reach + 1], taps[reach + 1 :]))
    taps = jnp.concatenate([taps[:1], *of_axes])
    return _call("branches", [x.shape], n, x, taps, side=np.int64(_side(n.shape[1])))[0]


def _require_unit(u: Unit, inputs: int) -> int:
    """Returns the number of outputs; raises ValueError unless all of a unit has its shape."""
    outputs = _require_product(u.product, inputs)
    _require((outputs,), *u[1:])
    return outputs


def _require_product(product: Product, inputs: int) -> int:
    words, outputs = product.negative.shape
    _require((-(-inputs // WORD), outputs), product.negative)
    _require((words if product.nonzero.shape[0] else 0, outputs), product.nonzero)
    _require((inputs,), product.move)
    return outputs


def _require_shortcut(shortcut: Array, shape: tuple[int, ...]) -> None:
    width = shortcut.shape[-1]
    _require((*shape[:-1], width), shortcut)
    if shape[-1] % width:
        raise ValueError(f"a shortcut of {width} channels cannot be repeated to {shape[-1]}")


def _require(shape: tuple[int, ...], *arrays: Array) -> None:
    for array in arrays:
        if array.shape != shape:
            raise ValueError(f"an array of shape {array.shape}, expected {shape}")


def _side(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"{tokens} tokens are no square grid")
    return side


def _call(
    name: str, shapes: Sequence[tuple[int, ...]], x: Array, *others: Array, **attributes: np.int64 | bool
) -> list[Array]:
    arrays = [array if array.dtype == jnp.uint32 else array.astype(x.dtype) for array in others]
    results = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]
    return list(jax.ffi.ffi_call(f"bvit_{name}", results)(x, *arrays, **attributes))


COMPILED = replace(
    XLA,
    count=_count,
    unit=_unit,
    unit_end=_unit_end,
    feed_forward=_feed_forward,
    attention=_attention,
    average_pool=_average_pool,
    downsample=_downsample,
    branches=_branches,
)
