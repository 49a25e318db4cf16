"""Ranking-aware distillation: the student orders the keys of every query as its teacher does.

Binarised probabilities are mostly equal, so the order is that of the student's probabilities before
binarisation. Bi-ViT (Li et al., AAAI 2024) names such a loss; its released code has none, and the equation
here is this project's own.

A row of N keys takes O(N) memory: of the N² pairs it looks at those that are adjacent in the teacher's
order, which together fix the order, and at as many random ones, which reach further.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# The teacher gives keys below this no order. A masked key of a shifted window has about exp(-100), which is
# a denormal number in float32, zero on some devices, and says nothing.
FLOOR = 1e-30

BLOCK_ROWS = 48  # that a CPU looks at together; 16 to 150 are about as fast


@dataclass(frozen=True)
class Ranking:
    """The ranking term of a training step.

    Attributes:
      weight: of the term in the loss.
      margin: see `ranking_loss`.
      layers: blocks that are ranked, in order of execution; () means all.
      every: of so many consecutive images one is ranked. Images come in random order, so that the gradient
        has the same mean.
    """

    weight: float
    margin: float = 0.1
    layers: tuple[int, ...] = ()
    every: int = 1

    def chosen(self, probabilities: Sequence[Array], images: int) -> list[Array]:
        """Returns what is ranked: of some layers, the probabilities of some of the images.

        Args:
          probabilities: of each block, (images, heads, queries, keys), or (images * windows, ...).
          images: number of them, a multiple of ``every``.
        """
        layers = [probabilities[i] for i in self.layers] if self.layers else probabilities
        return [self._some_images(x, images) for x in layers]

    def _some_images(self, x: Array, images: int) -> Array:
        if self.every == 1:
            return x
        # Neighbours are on one device: nothing moves where a device has a multiple of them.
        groups = x.reshape(images // self.every, self.every, x.shape[0] // images, *x.shape[1:])
        return groups[:, 0].reshape(-1, *x.shape[1:])


def ranking_loss(
    student: Sequence[Array], teacher: Sequence[Array], key: Array, *, margin: float = 0.1
) -> Array:
    """Returns how far the student is from ordering the keys of each query as the teacher does.

    For a row of N probabilities, S of the student and T of the teacher, it is the mean over pairs (j, k) of
    ``max(0, margin - (S_j - S_k) · sign(T_j - T_k) · N)``, and of these the mean over rows and layers. The
    pairs are those adjacent in the teacher's order and every j with ``(j + r) mod N``, r drawn for each
    layer. Pairs with equal T have no order and are left out.

    Args:
      student: probabilities before binarisation of each layer, (batch, heads, queries, keys), in windows
        (batch * windows, heads, queries, keys).
      teacher: likewise; no gradient reaches them. Where the numbers of heads differ, both sides are
        averaged over them.
      key: of the random pairs.
      margin: m, in units of the mean probability 1 / N.

    Returns:
      A scalar, float32 or wider.
    """
    layers = zip(student, teacher, jax.random.split(key, len(student)), strict=True)
    return jnp.mean(jnp.stack([_layer_loss(s, t, layer_key, margin) for s, t, layer_key in layers]))


def _layer_loss(student: Array, teacher: Array, key: Array, margin: float) -> Array:
    dtype = jnp.promote_types(student.dtype, jnp.float32)
    student, teacher = student.astype(dtype), lax.stop_gradient(teacher.astype(dtype))
    if student.shape[1] != teacher.shape[1]:
        student, teacher = jnp.mean(student, axis=1), jnp.mean(teacher, axis=1)
    keys = student.shape[-1]
    if keys < 2:
        return jnp.zeros((), dtype)
    shift = jax.random.randint(key, (), 1, keys)
    teacher = jnp.where(teacher < FLOOR, 0, teacher)
    batch = student.shape[0]  # stays by itself: it may be spread over devices
    return _mean_loss(student.reshape(batch, -1, keys), teacher.reshape(batch, -1, keys), shift, margin)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mean_loss(student: Array, teacher: Array, shift: Array, margin: float) -> Array:
    """Returns the mean over rows: (batch, rows, keys) twice, and a scalar from 1 to keys - 1."""
    return _forward(student, teacher, shift, margin)[0]


def _forward(
    student: Array, teacher: Array, shift: Array, margin: float
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the loss, and of its gradient a whole number for each key and a scale for each row.

    The numbers are from -4 to 4: as int8 they take a quarter of the memory of the probabilities, and the
    backward pass needs nothing else.
    """
    batch, rows, keys = student.shape
    total, slopes, scale = lax.platform_dependent(
        student,
        teacher,
        shift,
        cpu=partial(_compare_in_blocks, margin=margin),
        default=partial(_compare_rows, order_of=teacher_order, margin=margin),
    )
    return total / (batch * rows), (slopes, scale * (keys / (batch * rows)))


def _backward(margin: float, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    slopes, scale = residuals
    return slopes * (gradient * scale)[..., None], None, None


_mean_loss.defvjp(_forward, _backward)


def _compare_in_blocks(
    student: Array, teacher: Array, shift: Array, *, margin: float
) -> tuple[Array, Array, Array]:
    """Does what `_compare_rows` does, for a few rows of each element of the batch at a time.

    A CPU keeps them in its caches, which makes this four times as fast.
    """
    batch, rows, keys = student.shape
    length = min(rows, -(-BLOCK_ROWS // batch))
    count = -(-rows // length)

    def blocks(x: Array) -> Array:
        # Rows of zeros have no order and add nothing.
        x = jnp.pad(x, ((0, 0), (0, count * length - rows), (0, 0)))
        return x.reshape(batch, count, length, keys).swapaxes(0, 1)

    def whole(x: Array) -> Array:
        x = x.swapaxes(0, 1)
        return x.reshape(batch, count * length, *x.shape[3:])[:, :rows]

    def compare(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        return _compare_rows(*pair, shift, order_of=_order_by_network, margin=margin)

    totals, slopes, scales = lax.map(compare, (blocks(student), blocks(teacher)))
    return jnp.sum(totals), whole(slopes), whole(scales)


def _compare_rows(
    student: Array, teacher: Array, shift: Array, *, order_of: Callable[[Array], Array], margin: float
) -> tuple[Array, Array, Array]:
    """Returns the sum of the rows' means, the slopes of their keys, int8, and 1 / pairs of each row."""
    shape = student.shape
    student, teacher = student.reshape(-1, shape[-1]), teacher.reshape(-1, shape[-1])
    order = order_of(teacher)
    s, t = _take(student, order), _take(teacher, order)
    adjacent = _compare(_next(s), s, _next(t), t, margin)
    slopes = _put(jnp.roll(adjacent.slope, 1, axis=1) - adjacent.slope, order)

    s, t = jnp.roll(student, -shift, axis=1), jnp.roll(teacher, -shift, axis=1)
    random = _compare(student, s, teacher, t, margin)
    slopes += random.slope - jnp.roll(random.slope, shift, axis=1)

    scale = 1 / jnp.maximum(adjacent.number + random.number, 1).astype(student.dtype)
    total = jnp.sum((adjacent.total + random.total) * scale)
    return total, slopes.reshape(shape), scale.reshape(shape[:-1])


class _Pairs(NamedTuple):
    """Sums over the pairs of each row, (rows,), and the sign of each term's gradient, int8."""

    total: Array
    number: Array
    slope: Array


def _next(x: Array) -> Array:
    """Returns the element after each of a row; the last, which has none, is paired with itself: a tie."""
    return jnp.concatenate([x[:, 1:], x[:, -1:]], axis=1)


def _compare(s: Array, s_other: Array, t: Array, t_other: Array, margin: float) -> _Pairs:
    """Returns the terms of pairs, of which one element each is in ``s`` and ``s_other``.

    ``slope`` is the sign of the gradient of ``s``; that of ``s_other`` is its opposite.
    """
    above, below = t > t_other, t < t_other
    ordered = above | below
    ahead = (s - s_other) * s.shape[-1]
    ahead = jnp.where(above, ahead, -ahead)
    wrong = ordered & ~(ahead >= margin)  # a NaN is wrong too
    return _Pairs(
        total=jnp.sum(jnp.where(wrong, margin - ahead, 0), axis=1),
        number=jnp.sum(ordered, axis=1, dtype=jnp.int32),
        slope=jnp.where(wrong, jnp.where(above, -1, 1), 0).astype(jnp.int8),
    )


def teacher_order(teacher: Array) -> Array:
    """Returns the indices that sort each row of probabilities, int32: (rows, keys).

    One array of whole numbers is sorted, the upper bits of a probability with its index below them, because
    sorting values along with their indices takes a CPU five times as long. The bits of positive numbers are
    ordered as the numbers are, and the two highest are zero below 2. The lowest give way to the index, so
    that probabilities which differ by less than keys · 6e-8 of themselves may come in either order. That is
    harmless: who compares neighbours takes the sign from the probabilities.
    """
    packed, index = _packed(teacher)
    return (jnp.sort(packed) & index).astype(jnp.int32)


def _packed(teacher: Array) -> tuple[Array, Array]:
    """Returns what `teacher_order` sorts, and the bits of it that hold the index."""
    keys = teacher.shape[-1]
    index = jnp.uint32((1 << (keys - 1).bit_length()) - 1)
    bits = lax.bitcast_convert_type(teacher.astype(jnp.float32), jnp.uint32) << 2
    return (bits & ~index) | lax.broadcasted_iota(jnp.uint32, teacher.shape, teacher.ndim - 1), index


def _order_by_network(teacher: Array) -> Array:
    """Returns what `teacher_order` does, by a sorting network: a CPU compares many rows at once.

    It is the bitonic network (Batcher, 1968) in the form whose comparisons all have one direction.
    """
    packed, index = _packed(teacher)
    keys = packed.shape[-1]
    size = 1 << (keys - 1).bit_length()
    x = jnp.pad(packed.T, ((0, size - keys), (0, 0)), constant_values=np.uint32(0xFFFFFFFF))
    rows = x.shape[1]
    for length in (2 << i for i in range(size.bit_length() - 1)):
        # Two sorted runs: each element of one and its mirror image in the other, then halves of halves.
        runs = x.reshape(-1, 2, length // 2, rows)
        low, high = runs[:, 0], runs[:, 1, ::-1]
        x = jnp.concatenate([jnp.minimum(low, high), jnp.maximum(low, high)[:, ::-1]], axis=1)
        half = length // 4
        while half:
            low, high = jnp.unstack(x.reshape(-1, 2, half, rows), axis=1)
            x = jnp.stack([jnp.minimum(low, high), jnp.maximum(low, high)], axis=1)
            half //= 2
    return (x.reshape(size, rows)[:keys].T & index).astype(jnp.int32)


def _take(x: Array, order: Array) -> Array:
    return jnp.take_along_axis(x, order, axis=-1, mode="promise_in_bounds")


def _put(x: Array, order: Array) -> Array:
    """Undoes `_take`."""

    def row(x: Array, order: Array) -> Array:
        return jnp.zeros_like(x).at[order].set(x, mode="promise_in_bounds", unique_indices=True)

    return jax.vmap(row)(x, order)
