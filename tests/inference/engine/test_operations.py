"""Every operation of the engine against its formula, with zeros before the signs and among the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from bvit_jax.binary import bits
from bvit_jax.binary.convolutions import Geometry
from bvit_jax.inference.engine import operations
from bvit_jax.inference.engine.operations import Context, End, Product, Unit
from bvit_jax.layers import grid

pytestmark = pytest.mark.usefixtures("x64")


def values(*shape: int, seed: int = 0, zeros: bool = False) -> Array:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    return jnp.asarray(np.where(rng.random(shape) < 0.1, 0, x) if zeros else x)


def random_product(inputs: int, outputs: int, zeros: bool = False) -> tuple[Product, Array]:
    """Returns a packed matrix and its codes; the shift is zero where the matrix has zeros."""
    codes = jnp.sign(values(inputs, outputs, seed=inputs, zeros=zeros))
    packed = bits.pack(codes)
    nonzero = packed.nonzero if zeros else packed.nonzero[:0]
    move = values(inputs, seed=3) * (0.0 if zeros else 0.3)
    return Product(move, packed.negative, nonzero), codes


def random_unit(inputs: int, outputs: int, zeros: bool = False) -> tuple[Unit, Any]:
    """Returns a unit, and the function that it stands for."""
    product, codes = random_product(inputs, outputs, zeros)
    others = values(4, outputs, seed=7)

    def plain(x: Array, shortcut: Array) -> Array:
        factor, shift, slope, move2 = others
        shifted = (jnp.sign(x + product.move) @ codes) * factor + shift + shortcut
        return jnp.where(shifted > 0, shifted, slope * shifted) + move2

    return Unit(product, *others), plain


def sign(x: Array, bit: bool) -> Array:
    return jnp.where(x == 0, 1, jnp.sign(x)) if bit else jnp.sign(x)


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max()), a, b)


@pytest.mark.parametrize("bit", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("inputs", [8, 32, 45])
def test_counts_are_the_products_of_signs(inputs: int, zeros: bool, bit: bool) -> None:
    product, codes = random_product(inputs, 7, zeros)
    x = values(2, 3, inputs, zeros=zeros)
    y = jax.jit(lambda x: operations.count(x, product, bit=bit))(x)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, sign(x + product.move, bit) @ codes)


@pytest.mark.parametrize("zeros", [False, True])
def test_units(zeros: bool) -> None:
    """With a shortcut of the width of the output, and of a third of it; and at the end of a branch."""
    x, residual = values(2, 5, 8, zeros=zeros), values(2, 5, 24, seed=1)
    u, plain = random_unit(8, 24, zeros)
    end = End(*values(4, 24, seed=5))
    for shortcut in (x, residual):
        y = plain(x, jnp.tile(shortcut, 24 // shortcut.shape[-1]))
        close(operations.unit(x, u, shortcut), y)
        r = residual + y * end.alpha + end.move
        close(operations.unit_end(x, u, shortcut, residual, end), (r, r * end.factor + end.shift))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", [10, 10**6])
def test_feed_forward(monkeypatch: pytest.MonkeyPatch, rows: int, zeros: bool) -> None:
    monkeypatch.setattr(operations.units, "WIDE_VALUES", rows * 32)
    x, residual = values(2, 15, 8, zeros=zeros), values(2, 15, 8, seed=1)
    (expand, plain1), (contract, plain2) = random_unit(8, 32, zeros), random_unit(32, 8)
    end = End(*values(4, 8, seed=5))
    hidden = plain1(x, jnp.tile(x, 4))
    y = plain2(hidden, grid.average_channels(hidden, 4))
    r = residual + y * end.alpha + end.move
    close(operations.feed_forward(x, expand, contract, residual, end), (r, r * end.factor + end.shift))


def heads(x: Array, num_heads: int) -> Array:
    return x.reshape(*x.shape[:2], num_heads, -1)


@pytest.mark.parametrize("bit", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_scores_and_context(zeros: bool, bit: bool) -> None:
    """The head's width is no whole number of words, and neither is the number of keys."""
    q, k, v = values(2, 9, 24, zeros=zeros), values(2, 5, 24, seed=1, zeros=zeros), values(2, 5, 24, seed=2)
    v = v * (jnp.abs(v) > 0.1) if zeros else v
    y = operations.scores(q, k, 3, bit=bit)
    signs = [heads(sign(x, bit), 3) for x in (q, k, v)]
    np.testing.assert_array_equal(y, jnp.einsum("bqhd,bkhd->bhkq", *signs[:2]))
    mask = y > 0
    context = operations.context(mask, v, bit=bit)
    expected = jnp.einsum("bhkq,bkhd->bqhd", mask.astype(v.dtype), signs[2])
    np.testing.assert_array_equal(context, expected.reshape(q.shape))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("reduction", [1, 2])
def test_attention(reduction: int, zeros: bool) -> None:
    q = values(2, 16, 24, zeros=zeros)
    k, v = (values(2, 16 // reduction**2, 24, seed=seed, zeros=zeros) for seed in (1, 2))
    moves = values(3, 24, seed=3) * (0.0 if zeros else 0.1)
    norm, scale = Context(*values(4, 24, seed=4)), jnp.float64(0.1)
    sq, sk, sv = (heads(jnp.sign(x + move), 3) for x, move in zip((q, k, v), moves, strict=True))
    probs = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", sq, sk) / np.sqrt(8))
    codes = jnp.clip(jnp.round(probs / scale), 0, 1)
    assert 0 < codes.mean() < 1
    counted = jnp.einsum("bhqk,bkhd->bqhd", codes, sv).reshape(q.shape)
    shifted = counted * norm.factor + norm.shift + q + grid.upsample(k + v, reduction)
    expected = jnp.where(shifted > 0, shifted, norm.slope * shifted) + norm.move2
    close(operations.attention(q, k, v, moves, norm, scale, 3, reduction), expected)


def test_half_a_scale_does_not_count() -> None:
    """Two keys alike have the probability 0.5 exactly, and half of the scale is rounded to even."""
    q, k = jnp.ones((1, 1, 4)), jnp.ones((1, 2, 4))
    norm = Context(*jnp.ones((2, 4)) * jnp.asarray([[1.0], [0.0]]), jnp.ones(4), jnp.zeros(4))
    for scale, counts in ((1.0, 0), (0.99, 2)):
        y = operations.attention(q, k, k, jnp.zeros((3, 4)), norm, jnp.float64(scale), 1, 1)
        np.testing.assert_array_equal(y[0, 0] - 3, jnp.full(4, counts))


@pytest.mark.parametrize("sizes", [(3,), (3, 5), (1, 7)])
def test_branches(sizes: tuple[int, ...]) -> None:
    n, x = values(2, 16, 6), values(2, 16, 6, seed=1)
    reach = max(sizes) // 2
    taps, expected = np.zeros((1 + 2 * reach, 6)), x
    for size in sizes:
        for axis, first in ((1, 1), (2, 1 + reach)):
            alpha = values(6, seed=10 * size + axis)
            taps[0] += alpha / size
            taps[first : first + size // 2] += alpha / size
            expected += alpha * grid.to_tokens(grid.average_line(grid.to_grid(n), size, axis))
    close(operations.branches(n, x, jnp.asarray(taps)), expected)


@pytest.mark.parametrize("sizes", [(5,), (3, 5)])
def test_shifts(sizes: tuple[int, ...]) -> None:
    """One tap for each direction and distance of a grid that goes on at its other end."""
    n, x, reach = values(2, 36, 8), values(2, 36, 8, seed=1), max(sizes) // 2
    taps, expected = np.zeros((1 + 4 * reach, 8)), x
    for size in sizes:
        h, w, ch = values(3, 8, seed=size)
        taps[0] += (h + w) / size
        for distance in range(1, size // 2 + 1):
            for side, alpha in enumerate((h, h, w, w)):
                taps[side * reach + distance] += alpha / size
        for side in range(4):
            quarter = slice(2 * side, 2 * side + 2)
            taps[side * reach + size // 2, quarter] += ch[quarter]
        branches = (
            grid.mean_shift(grid.to_grid(n), size, 1) * h + grid.mean_shift(grid.to_grid(n), size, 2) * w
        )
        expected += grid.to_tokens(branches + grid.channel_shift(grid.to_grid(n), size // 2) * ch)
    close(operations.shifts(n, x, jnp.asarray(taps)), expected)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dilation", [1, 3])
def test_convolutions(dilation: int, zeros: bool) -> None:
    x = values(2, 5, 5, 8, zeros=zeros)
    product, codes = random_product(18, 12, zeros)
    product = product._replace(move=values(8, seed=3) * (0.0 if zeros else 0.3))
    kernel = codes.reshape(3, 3, 2, 12)
    y = operations.convolution(x, product, dilation, 4)
    signs = jnp.sign(x + product.move)
    np.testing.assert_array_equal(y, Geometry(dilation, 4).convolve(signs, kernel))
