"""Compiled operations against those of XLA, for every vector unit of this CPU."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from bvit_jax.binary import bits
from bvit_jax.binary.units import Product, Unit
from bvit_jax.inference.engine import compiled, levels
from bvit_jax.inference.engine.operations import Context, End

try:
    import bvit_kernels

    UNITS = bvit_kernels.vector_units()
except ImportError:
    bvit_kernels, UNITS = None, []

installed = pytest.mark.skipif(bvit_kernels is None, reason="bvit_kernels is not installed")


@pytest.fixture(params=UNITS or ["none"])
def vector_unit(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each vector unit."""
    before = bvit_kernels.vector_unit()
    bvit_kernels.choose(request.param)
    yield request.param
    bvit_kernels.choose(before)


class Arrays:
    """Random arrays, with zeros among them if asked for."""

    def __init__(self, dtype: str, zeros: bool) -> None:
        self._random, self._dtype, self._zeros = np.random.default_rng(0), dtype, zeros

    def __call__(self, *shape: int) -> Array:
        x = self._random.normal(size=shape)
        return jnp.asarray(
            np.where(self._random.random(shape) < 0.1, 0, x) if self._zeros else x, self._dtype
        )

    def product(self, inputs: int, outputs: int) -> Product:
        packed = bits.pack(self(inputs, outputs))
        nonzero = packed.nonzero if self._zeros else packed.nonzero[:0]
        move = jnp.zeros(inputs, self._dtype) if self._zeros else self(inputs)
        return Product(move, packed.negative, nonzero)

    def unit(self, inputs: int, outputs: int) -> Unit:
        return Unit(self.product(inputs, outputs), *(self(outputs) for _ in range(4)))

    def vectors(self, kind: Any, channels: int) -> Any:
        return kind(*(self(channels) for _ in kind._fields))


def assert_equal(name: str, *arguments: Any, exact: bool = False, **options: Any) -> None:
    """Compares an operation's results, up to the rounding of its sums."""
    ours, theirs = (
        jax.tree.leaves(jax.jit(lambda *a, of=of: getattr(of, name)(*a, **options))(*arguments))
        for of in (compiled.COMPILED, levels.XLA)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        epsilon = 0 if exact else 64 * jnp.finfo(b.dtype).eps * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=epsilon)


@installed
@pytest.mark.usefixtures("x64", "vector_unit")
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_compiled_operations_compute_what_xla_does(dtype: str, zeros: bool) -> None:
    make = Arrays(dtype, zeros)
    for width, bit in ((40, False), (64, True)):
        assert_equal("count", make(2, 5, width), make.product(width, 33), bit=bit, exact=True)
    x = make(2, 9, 64)
    assert_equal("unit", x, make.unit(64, 192), x)
    assert_equal("unit", make(2, 4, 24), make.unit(24, 40), make(2, 4, 20))
    assert_equal("unit_end", x, make.unit(64, 64), x, make(2, 9, 64), make.vectors(End, 64))
    for width, hidden in ((32, 256), (64, 256), (40, 120)):
        units = make.unit(width, hidden), make.unit(hidden, width)
        assert_equal("feed_forward", make(1, 70, width), *units, make(1, 70, width), make.vectors(End, width))
    for side, reduction, heads, width in ((4, 1, 2, 128), (6, 2, 1, 64), (7, 1, 3, 72)):
        q, keys = make(2, side**2, width), (side // reduction) ** 2
        k, v = make(2, keys, width), make(2, keys, width)
        scale = jnp.asarray(0.8 / keys, dtype)
        norm = make.vectors(Context, width)
        assert_equal("attention", q, k, v, make(3, width), norm, scale, num_heads=heads, reduction=reduction)
    for side, size, width in ((8, 4, 64), (7, 2, 24)):
        assert_equal("average_pool", make(2, (side // size * size) ** 2, width), size=size)
    for width, outputs in ((64, 128), (20, 40)):
        tail = make(4, outputs), make(outputs), make(outputs)
        assert_equal("downsample", make(2, 16, width), make.unit(4 * width, outputs), *tail)
    for taps in (1, 3, 5, 7):
        assert_equal("branches", make(2, 25, 24), make(2, 25, 24), make(taps, 24))


@installed
def test_no_key_is_attended_to_where_the_scale_is_negative(vector_unit: str) -> None:
    make = Arrays("float32", False)
    q, norm = make(1, 16, 64), make.vectors(Context, 64)
    assert_equal("attention", q, q, q, make(3, 64), norm, jnp.float32(-0.1), num_heads=1, reduction=1)


@installed
def test_code_that_counts_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bvit_kernels._native, "count", lambda x, negative, nonzero, y: None)
    with pytest.raises(ImportError, match="products are wrong with"):
        bvit_kernels.check()


def test_code_that_fails_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = 'raise ImportError("bvit_kernels: products are wrong with avx2")'
    (tmp_path / "bvit_kernels.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bvit_kernels", raising=False)
    compiled.available.cache_clear()
    with pytest.warns(UserWarning, match="wrong with avx2; packed models run without it") as warned:
        assert [compiled.best(), compiled.best()] == [levels.XLA] * 2
    assert len(warned) == 1
    compiled.available.cache_clear()


def test_shapes_that_do_not_fit_stop_before_the_call() -> None:
    make = Arrays("float32", False)
    x, u = make(1, 4, 64), make.unit(64, 64)
    short = u._replace(slope=make(32))
    narrow = u._replace(product=u.product._replace(negative=u.product.negative[:1]))
    end = make.vectors(End, 64)
    op = compiled.COMPILED
    for call in (
        lambda: op.unit(x, short, x),
        lambda: op.count(x, narrow.product),
        lambda: op.unit(x, u, make(1, 4, 48)),
        lambda: op.unit_end(x, u, x, make(1, 3, 64), end),
        lambda: op.unit_end(x, u, x, x, end._replace(alpha=make(1))),
        lambda: op.feed_forward(x, make.unit(64, 128), make.unit(128, 32), x, end),
        lambda: op.attention(x, x[:, :2], x, make(3, 64), make.vectors(Context, 64), make(), 1, 1),
        lambda: op.average_pool(make(1, 5, 8), 2),
        lambda: op.downsample(x, make.unit(256, 64), make(4, 64), make(64), make(64)),
        lambda: op.branches(x, x, make(3, 32)),
    ):
        with pytest.raises(ValueError, match=r"expected|repeated|grid|ends in"):
            jax.eval_shape(call)
