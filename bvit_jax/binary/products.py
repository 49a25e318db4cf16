"""Products of binary tensors: exact, whatever the compute dtype, with hand-written gradients.

A product of values in {-1, 0, 1} is a sum of whole numbers. Held in bfloat16 and accumulated in float32
it is exact up to 2^24 terms, takes half or a quarter of the memory of float32 operands and runs on the
fast units of every accelerator. So the forward products here take bfloat16 codes even when the model
computes in float32 or float64, and scales are applied afterwards. The gradients are real numbers: their
products are computed in the compute dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from bvit_jax.binary import quantize

CODE_DTYPE = jnp.bfloat16
PRODUCT = "binary_product"  # by this name a rematerialisation policy finds the products to keep


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of sums over values of ``dtype``: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def integer_dtype(terms: int) -> jnp.dtype:
    """Returns the smallest dtype that holds every sum of ``terms`` values in {-1, 0, 1}."""
    return next(jnp.dtype(d) for d in (jnp.int8, jnp.int16, jnp.int32) if terms <= jnp.iinfo(d).max)


class WeightRule(NamedTuple):
    """How weights are binarised, what gradient they get, and to which of them the sign passes one.

    ``centred`` returns what the sign is taken of.
    """

    codes: Callable[[Array], Array]
    gradient: Callable[[Array, Array], Array]
    window: Callable[[Array], Array]
    centred: Callable[[Array], Array] = lambda kernel: kernel


DENSE = WeightRule(quantize.dense_codes, quantize.dense_gradient, quantize.dense_window, quantize.centred)
CONV = WeightRule(quantize.conv_codes, quantize.conv_gradient, quantize.conv_window)
BITS = CONV._replace(codes=quantize.weight_bit)


class ProductConfig(NamedTuple):
    """The static part of a product: the weights' rule, whether and how the input is binarised, the dtype.

    With ``integer_products`` the product before its scale is cast to `integer_dtype`, which is exact, and
    named `PRODUCT` for a rematerialisation policy.
    """

    rule: WeightRule
    binary_input: bool
    dtype: DTypeLike
    sign: Callable[[Array], Array] = quantize.sign  # any whose slope is `quantize.sign_slope`
    integer_products: bool = False

    def operand(self, shifted: Array) -> Array:
        """Returns what is multiplied with the weights' codes, in a dtype that holds it exactly."""
        return self.sign(shifted).astype(CODE_DTYPE) if self.binary_input else shifted


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def binary_product(x: Array, move: Array, kernel: Array, config: ProductConfig) -> Array:
    """Returns ``sign(x + move) @ W``, with W the binarised ``kernel`` and the sign that of ``config``.

    The sum ``x + move`` is taken in float32 at least, so that rounding makes no zeros before the sign.
    Gradients: `quantize.sign`'s for ``x`` and ``move``, `quantize.binarize_dense`'s or
    `quantize.binarize_conv`'s for ``kernel``. Only the arguments are kept for the backward pass.

    Args:
      x: (..., in), real.
      move: the shift of each input channel, (in,).
      kernel: latent weights (..., out) with ``in`` values an output channel.
      config: with ``binary_input`` False the sign is left out.

    Returns:
      (..., out) in the accumulator of ``config.dtype``.
    """
    return _binary_product(x, move, kernel, config)


def _binary_product(x: Array, move: Array, kernel: Array, config: ProductConfig) -> Array:
    shifted = x.astype(accumulator_dtype(config.dtype)) + move
    return _scaled_product(config.operand(shifted), kernel, config)


def _scaled_product(operand: Array, kernel: Array, config: ProductConfig) -> Array:
    if not config.binary_input:
        operand = operand.astype(config.dtype)
    codes = _matrix(kernel, config).astype(operand.dtype)
    accumulator = accumulator_dtype(operand.dtype)
    y = jnp.matmul(operand, codes, preferred_element_type=accumulator)
    if config.integer_products:
        y = checkpoint_name(y.astype(integer_dtype(codes.shape[0])) if config.binary_input else y, PRODUCT)
    return y.astype(accumulator_dtype(config.dtype)) * quantize.weight_scale(kernel)


def _matrix(kernel: Array, config: ProductConfig) -> Array:
    return config.rule.codes(kernel).reshape(-1, kernel.shape[-1])


def _binary_product_forward(
    x: Array, move: Array, kernel: Array, config: ProductConfig
) -> tuple[Array, tuple[Array, Array, Array]]:
    # Not `binary_product`, within which no rematerialisation policy would see the product.
    return _binary_product(x, move, kernel, config), (x, move, kernel)


def _binary_product_backward(
    config: ProductConfig, residuals: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    x, move, kernel = residuals
    dtype, accumulator = config.dtype, accumulator_dtype(config.dtype)
    shifted = x.astype(accumulator) + move
    rows = config.operand(shifted).astype(dtype).reshape(-1, x.shape[-1])
    columns = gradient.astype(dtype).reshape(-1, gradient.shape[-1])
    to_matrix = jnp.matmul(rows.T, columns, preferred_element_type=accumulator)
    to_kernel = config.rule.gradient(kernel, to_matrix.reshape(kernel.shape).astype(kernel.dtype))

    scaled = (gradient * quantize.weight_scale(kernel)).astype(dtype)
    matrix = _matrix(kernel, config).astype(dtype)
    to_shifted = jnp.matmul(scaled, matrix.T, preferred_element_type=accumulator)
    if config.binary_input:
        to_shifted *= quantize.sign_slope(shifted)
    to_move = jnp.sum(to_shifted, axis=tuple(range(x.ndim - 1)))
    return to_shifted.astype(x.dtype), to_move.astype(move.dtype), to_kernel


binary_product.defvjp(_binary_product_forward, _binary_product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def binary_scores(q: Array, k: Array, dtype: DTypeLike, integer_products: bool = False) -> Array:
    """Returns the products of the signs of queries and keys, head by head.

    Args:
      q: (batch, queries, heads, size), real; its gradient is that of `quantize.sign`.
      k: (batch, keys, heads, size), likewise.
      dtype: compute dtype, of the products in the backward pass.
      integer_products: that of `ProductConfig`.

    Returns:
      (batch, heads, queries, keys), whole numbers, in the accumulator of ``dtype``.
    """
    return _binary_scores(q, k, dtype, integer_products)


def _binary_scores(q: Array, k: Array, dtype: DTypeLike, integer_products: bool) -> Array:
    signs = (quantize.sign(a).astype(CODE_DTYPE) for a in (q, k))
    scores = jnp.einsum("bqhd,bkhd->bhqk", *signs, preferred_element_type=jnp.float32)
    if integer_products:
        scores = checkpoint_name(scores.astype(integer_dtype(q.shape[-1])), PRODUCT)
    return scores.astype(accumulator_dtype(dtype))


def _binary_scores_backward(
    dtype: DTypeLike, integer_products: bool, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    del integer_products
    q, k = residuals
    accumulator = accumulator_dtype(dtype)
    product = partial(jnp.einsum, preferred_element_type=accumulator)
    gradient = gradient.astype(dtype)
    to_q = product("bhqk,bkhd->bqhd", gradient, quantize.sign(k).astype(dtype))
    to_k = product("bhqk,bqhd->bkhd", gradient, quantize.sign(q).astype(dtype))
    return _through_sign(to_q, q), _through_sign(to_k, k)


# Not the functions themselves forwards, within which no rematerialisation policy would see the product.
binary_scores.defvjp(
    lambda q, k, dtype, integer_products: (_binary_scores(q, k, dtype, integer_products), (q, k)),
    _binary_scores_backward,
)


def _through_sign(gradient: Array, x: Array) -> Array:
    """Returns the gradient of ``x``, (batch, tokens, heads, size), from that of its sign.

    Heads are laid side by side meanwhile: the TPU compiler otherwise computes the slope in the layout of x
    and copies it, in float32, to that of the gradient.
    """
    tokens = *x.shape[:2], -1
    product = gradient.reshape(tokens) * quantize.sign_slope(x.reshape(tokens))
    return product.reshape(x.shape).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def binary_context(codes: Array, v: Array, dtype: DTypeLike, integer_products: bool = False) -> Array:
    """Returns the sums of the signs of the values that each query attends to, head by head.

    Args:
      codes: attention codes in {0, 1}, (batch, heads, queries, keys).
      v: (batch, keys, heads, size), real; its gradient is that of `quantize.sign`.
      dtype: compute dtype, of the products in the backward pass.
      integer_products: that of `ProductConfig`.

    Returns:
      (batch, queries, heads, size), whole numbers, in the accumulator of ``dtype``.
    """
    return _binary_context(codes, v, dtype, integer_products)


def _binary_context(codes: Array, v: Array, dtype: DTypeLike, integer_products: bool) -> Array:
    signs = quantize.sign(v).astype(CODE_DTYPE)
    context = jnp.einsum(
        "bhqk,bkhd->bqhd", codes.astype(CODE_DTYPE), signs, preferred_element_type=jnp.float32
    )
    if integer_products:
        # Heads side by side: a TPU would pad each of them.
        kept = context.astype(integer_dtype(v.shape[1])).reshape(*context.shape[:2], -1)
        context = checkpoint_name(kept, PRODUCT).reshape(context.shape)
    return context.astype(accumulator_dtype(dtype))


def _binary_context_backward(
    dtype: DTypeLike, integer_products: bool, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    del integer_products
    codes, v = residuals
    product = partial(jnp.einsum, preferred_element_type=accumulator_dtype(dtype))
    gradient = gradient.astype(dtype)
    to_codes = product("bqhd,bkhd->bhqk", gradient, quantize.sign(v).astype(dtype))
    to_v = product("bhqk,bqhd->bkhd", codes.astype(dtype), gradient)
    return to_codes.astype(codes.dtype), _through_sign(to_v, v)


binary_context.defvjp(
    lambda codes, v, dtype, integer_products: (
        _binary_context(codes, v, dtype, integer_products),
        (codes, v),
    ),
    _binary_context_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def code_product(a: Array, b: Array, equation: str, dtype: DTypeLike) -> Array:
    """Returns the exact product of whole numbers of magnitude at most 256, which bfloat16 holds.

    Args:
      a, b: codes, whole numbers in any floating-point dtype.
      equation: for ``einsum``, such as "bqhd,bkhd->bhqk"; every index is in two of its three terms.
      dtype: compute dtype, of the products in the backward pass.

    Returns:
      Whole numbers in the accumulator of ``dtype``.
    """
    codes = (x.astype(CODE_DTYPE) for x in (a, b))
    y = jnp.einsum(equation, *codes, preferred_element_type=jnp.float32)
    return y.astype(accumulator_dtype(dtype))


def _code_product_backward(
    equation: str, dtype: DTypeLike, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    a, b = residuals
    left, right, out = equation.replace("->", ",").split(",")
    product = partial(jnp.einsum, preferred_element_type=accumulator_dtype(dtype))
    gradient = gradient.astype(dtype)
    to_a = product(f"{out},{right}->{left}", gradient, b.astype(dtype))
    to_b = product(f"{out},{left}->{right}", gradient, a.astype(dtype))
    return to_a.astype(a.dtype), to_b.astype(b.dtype)


code_product.defvjp(
    lambda a, b, equation, dtype: (code_product(a, b, equation, dtype), (a, b)), _code_product_backward
)


def real_product(x: Array, kernel: Array) -> Array:
    """Returns ``x @ kernel`` in the accumulator of x's dtype; x (..., in), kernel (in, out)."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=accumulator_dtype(x.dtype))
