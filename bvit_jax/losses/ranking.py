"""Ranking-aware distillation: the student should order the keys of every query as its teacher does.

Most binarised probabilities are equal, so the order is that of the student's probabilities before
binarisation. Bi-ViT (Li et al., AAAI 2024) describes such a loss; its released code has none, and the
equation here is this project's own.

A row of N keys takes O(N) memory: of its N² pairs the loss uses those that are adjacent in the teacher's
order, which determine the order, and as many random ones, which reach further.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Key

from bvit_jax.losses.ordering import order_by_network, order_by_sort

# Teacher probabilities below this count as equal. A masked key of a shifted window has about exp(-100), a
# denormal float32 that is zero on some devices and carries no information.
FLOOR = 1e-30

BLOCK_ROWS = 48  # rows that a CPU processes together; 16 to 150 are about equally fast

# One array a layer, whose sizes differ; with windows the batch is images * windows.
Probabilities = Sequence[Float[Array, "_batch _heads _queries _keys"]]


def ranking_loss(
    student: Probabilities, teacher: Probabilities, key: Key[Array, ""], *, margin: float = 0.1
) -> Float[Array, ""]:
    """Returns how far the student is from ordering the keys of each query as the teacher does.

    For a row of N probabilities, S of the student and T of the teacher, it is the mean over pairs (j, k) of
    ``max(0, margin - (S_j - S_k) · sign(T_j - T_k) · N)``, averaged over rows and layers, float32 or
    wider. The pairs are those adjacent in the teacher's order, and every j with ``(j + r) mod N``, where r is
    drawn per layer. Pairs with equal T have no order and are left out.

    Args:
      student: probabilities before binarisation.
      teacher: likewise, without gradient. If the numbers of heads differ, both sides are averaged over
        heads.
      key: for the random pairs.
      margin: in units of the mean probability, 1 / N.
    """
    layers = zip(student, teacher, jax.random.split(key, len(student)), strict=True)
    return jnp.mean(jnp.stack([_layer_loss(s, t, layer_key, margin) for s, t, layer_key in layers]))


def _layer_loss(student: Array, teacher: Array, key: Array, margin: float) -> Array:
    dtype = jnp.float64 if student.dtype == jnp.float64 else jnp.float32
    student, teacher = student.astype(dtype), lax.stop_gradient(teacher.astype(dtype))
    if student.shape[1] != teacher.shape[1]:
        student, teacher = jnp.mean(student, axis=1), jnp.mean(teacher, axis=1)
    keys = student.shape[-1]
    if keys < 2:
        return jnp.zeros((), dtype)
    shift = jax.random.randint(key, (), 1, keys)
    teacher = jnp.where(teacher < FLOOR, 0, teacher)
    batch = student.shape[0]  # not merged with the rows: it may be sharded over devices
    return _mean_loss(student.reshape(batch, -1, keys), teacher.reshape(batch, -1, keys), shift, margin)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mean_loss(student: Array, teacher: Array, shift: Array, margin: float) -> Array:
    """Returns the mean over rows: (batch, rows, keys) twice, and a shift from 1 to keys - 1 -> scalar."""
    return _forward(student, teacher, shift, margin)[0]


def _forward(
    student: Array, teacher: Array, shift: Array, margin: float
) -> tuple[Array, tuple[Array, Array]]:
    """Returns the loss and its gradient as an integer per key and a scale per row.

    The integers lie from -4 to 4: as int8 they take a quarter of the memory of the probabilities, and the
    backward pass needs nothing else.
    """
    batch, rows, keys = student.shape
    total, slopes, scale = lax.platform_dependent(
        student,
        teacher,
        shift,
        cpu=partial(_compare_in_blocks, margin=margin),
        default=partial(_compare_rows, order_of=order_by_sort, margin=margin),
    )
    return total / (batch * rows), (slopes, scale * (keys / (batch * rows)))


def _backward(margin: float, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    slopes, scale = residuals
    return slopes.astype(scale.dtype) * (gradient * scale)[..., None], None, None


_mean_loss.defvjp(_forward, _backward)


def _compare_in_blocks(
    student: Array, teacher: Array, shift: Array, *, margin: float
) -> tuple[Array, Array, Array]:
    """Returns the same as `_compare_rows`, from a few rows of each batch element at a time.

    They stay in the caches of a CPU, which makes this four times as fast there.
    """
    batch, rows, keys = student.shape
    length = min(rows, -(-BLOCK_ROWS // batch))
    count = -(-rows // length)

    def blocks(x: Array) -> Array:
        # Rows of zeros have no order and contribute nothing.
        x = jnp.pad(x, ((0, 0), (0, count * length - rows), (0, 0)))
        return x.reshape(batch, count, length, keys).swapaxes(0, 1)

    def rejoined(x: Array) -> Array:
        x = x.swapaxes(0, 1)
        return x.reshape(batch, count * length, *x.shape[3:])[:, :rows]

    def compare(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        return _compare_rows(*pair, shift, order_of=order_by_network, margin=margin)

    totals, slopes, scales = lax.map(compare, (blocks(student), blocks(teacher)))
    return jnp.sum(totals), rejoined(slopes), rejoined(scales)


def _compare_rows(
    student: Array, teacher: Array, shift: Array, *, order_of: Callable[[Array], Array], margin: float
) -> tuple[Array, Array, Array]:
    """Returns the sum of the means of rows, the int8 slope of each key, and 1 / pairs of each row."""
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
    """Sums over the pairs of each row, (rows,), and the sign of each term's gradient, int8 (rows, keys)."""

    total: Array
    number: Array
    slope: Array


def _next(x: Array) -> Array:
    """Returns the successor of each element of a row; the last one's is itself, which makes a tie."""
    return jnp.concatenate([x[:, 1:], x[:, -1:]], axis=1)


def _compare(s: Array, s_other: Array, t: Array, t_other: Array, margin: float) -> _Pairs:
    """Returns the terms of the pairs ``(s, s_other)``, given the teacher's ``(t, t_other)``.

    ``slope`` is the sign of the gradient with respect to ``s``; for ``s_other`` it is the opposite.
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


def _take(x: Array, order: Array) -> Array:
    return jnp.take_along_axis(x, order, axis=-1, mode="promise_in_bounds")


def _put(x: Array, order: Array) -> Array:
    """Undoes `_take`."""

    def row(x: Array, order: Array) -> Array:
        return jnp.zeros_like(x).at[order].set(x, mode="promise_in_bounds", unique_indices=True)

    return jax.vmap(row)(x, order)
