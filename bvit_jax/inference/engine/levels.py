"""Which code runs the operations of the engine: XLA's everywhere, or compiled code on a CPU that has it.

`XLA` counts bits with XLA's population count. `COMPILED` calls the package bvit_kernels (``kernels/`` of the
repository), which registers a target of XLA's foreign function interface for each operation. Both compute the
same integers, and the same real numbers up to the order of their sums.
"""

import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bvit_jax.inference.engine import operations
from bvit_jax.inference.engine.operations import Context, End, Product, Unit

PACKAGE = "bvit_kernels"
REACH = 2  # of the compiled stencil


@dataclass(frozen=True)
class Operations:
    """The operations, functions as `bvit_jax.inference.engine.operations` has them."""

    count: Callable[..., Array]
    unit: Callable[..., Array]
    unit_end: Callable[..., tuple[Array, Array]]
    feed_forward: Callable[..., tuple[Array, Array]]
    attention: Callable[..., Array]
    average_pool: Callable[..., Array]
    downsample: Callable[..., tuple[Array, Array]]
    branches: Callable[..., Array]
    follow: Callable[..., Array]
    normalise: Callable[..., Array]


XLA = Operations(*(getattr(operations, field.name) for field in fields(Operations)))


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
    shape = (*x.shape[:-1], product.negative.shape[1])
    return _call("count", [shape], x, *product, bit=bit)[0]


def _unit(x: Array, u: Unit, shortcut: Array) -> Array:
    return _call("unit", [(*x.shape[:-1], u.factor.shape[0])], x, *_flat(u), shortcut)[0]


def _unit_end(x: Array, u: Unit, shortcut: Array, residual: Array, end: End) -> tuple[Array, Array]:
    r, n = _call("unit_end", [residual.shape] * 2, x, *_flat(u), shortcut, residual, *end)
    return r, n


def _feed_forward(x: Array, expand: Unit, contract: Unit, residual: Array, end: End) -> tuple[Array, Array]:
    r, n = _call("feed_forward", [x.shape] * 2, x, *_flat(expand), *_flat(contract), residual, *end)
    return r, n


def _attention(
    q: Array, k: Array, v: Array, moves: Array, norm: Context, scale: Array, num_heads: int, reduction: int
) -> Array:
    sizes = {"heads": np.int64(num_heads), "reduction": np.int64(reduction)}
    return _call("attention", [q.shape], q, k, v, moves, *norm, scale, **sizes)[0]


def _average_pool(x: Array, size: int) -> Array:
    images, tokens, channels = x.shape
    sizes = {"side": np.int64(math.isqrt(tokens)), "size": np.int64(size)}
    return _call("pool", [(images, tokens // size**2, channels)], x, **sizes)[0]


def _downsample(n: Array, u: Unit, positions: Array, factor: Array, shift: Array) -> tuple[Array, Array]:
    shapes = [(n.shape[0], *positions.shape)] * 2
    side = np.int64(math.isqrt(n.shape[1]))
    x, n = _call("downsample", shapes, n, *_flat(u), positions, factor, shift, side=side)
    return x, n


def _branches(n: Array, x: Array, taps: Array) -> Array:
    reach = taps.shape[0] // 2
    if reach > REACH:
        return operations.branches(n, x, taps)
    missing = ((0, REACH - reach), (0, 0))
    of_axes = (jnp.pad(of_axis, missing) for of_axis in (taps[1 : reach + 1], taps[reach + 1 :]))
    taps = jnp.concatenate([taps[:1], *of_axes])
    return _call("branches", [x.shape], n, x, taps, side=np.int64(math.isqrt(n.shape[1])))[0]


def _flat(u: Unit) -> tuple[Array, ...]:
    return (*u.product, *u[1:])


def _call(
    name: str, shapes: Sequence[tuple[int, ...]], x: Array, *others: Array, **attributes: np.int64 | bool
) -> list[Array]:
    results = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]
    return list(jax.ffi.ffi_call(f"bvit_{name}", results)(x, *others, **attributes))


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
