"""Products of binary tensors: exact, whatever the compute dtype, with hand-written gradients.

A product of values in {-1, 0, 1} is a sum of integers. Held in bfloat16 and accumulated in float32 it is
exact up to 2^24 terms, takes half or a quarter of the memory of float32 operands and runs on the fast units
of every accelerator. So the forward products here take bfloat16 codes even when the model computes in float32
or float64, and scales are applied afterwards. The gradients are real numbers: their products are computed in
the compute dtype.

What a product computes is in the forward rule of its `jax.custom_vjp`: a rematerialisation policy sees names
there, and does not see those in the function itself.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from bvit_jax.binary.estimators import PARABOLA, Estimator
from bvit_jax.binary.weights import WeightRule
from bvit_jax.imports.shapes import Float

CODE_DTYPE = jnp.bfloat16
PRODUCT = "binary_product"  # the name by which a rematerialisation policy finds integer products


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of sums over values of ``dtype``: at least float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def integer_dtype(terms: int) -> jnp.dtype:
    """Returns the smallest dtype that holds every sum of ``terms`` values in {-1, 0, 1}."""
    return next(jnp.dtype(d) for d in (jnp.int8, jnp.int16, jnp.int32) if terms <= jnp.iinfo(d).max)


class ProductConfig(NamedTuple):
    """How products are computed; hashable, a static argument of each.

    Attributes:
      dtype: compute dtype of real operands and of the products in the backward pass.
      estimator: the sign of real operands, and the slope of its gradient.
      binary_input: whether the input of a product with weights goes through the sign.
      integer_products: whether the product before its scale is cast to `integer_dtype`, which is exact, and
        named `PRODUCT` for a rematerialisation policy.
    """

    dtype: DTypeLike
    estimator: Estimator = PARABOLA
    binary_input: bool = True
    integer_products: bool = False

    def signs(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns the signs of ``x`` in the dtype of codes."""
        return self.estimator.forward(x).astype(CODE_DTYPE)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def binary_product(
    x: Float[Array, "*batch inputs"],
    move: Float[Array, " inputs"],
    kernel: Float[Array, "*kernel outputs"],
    rule: WeightRule,
    config: ProductConfig,
) -> Float[Array, "*batch outputs"]:
    """Returns ``sign(x + move) @ W``, with W the kernel as ``rule`` quantises it.

    The sum ``x + move`` is taken in float32 at least, so that rounding makes no zeros before the sign.
    Only the arguments are saved for the backward pass.

    Args:
      x: real; its gradient and that of ``move`` have the slope of the estimator.
      move: the shift of each input channel.
      kernel: latent weights, ``inputs`` values per output channel; the gradient is the rule's.
      rule: how weights are quantised.
      config: without ``binary_input`` the sign is left out.

    Returns:
      The product in the accumulator of ``config.dtype``.
    """
    return _binary_product_forward(x, move, kernel, rule, config)[0]


def _binary_product_forward(
    x: Array, move: Array, kernel: Array, rule: WeightRule, config: ProductConfig
) -> tuple[Array, tuple[Array, Array, Array]]:
    shifted = x.astype(accumulator_dtype(config.dtype)) + move
    operand = config.signs(shifted) if config.binary_input else shifted.astype(config.dtype)
    weights = rule.quantize(kernel)
    codes = weights.values.astype(operand.dtype)
    y = jnp.matmul(operand, codes, preferred_element_type=accumulator_dtype(operand.dtype))
    if config.integer_products:
        y = checkpoint_name(y.astype(integer_dtype(codes.shape[0])) if config.binary_input else y, PRODUCT)
    return y.astype(accumulator_dtype(config.dtype)) * weights.scale, (x, move, kernel)


def _binary_product_backward(
    rule: WeightRule, config: ProductConfig, residuals: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    x, move, kernel = residuals
    dtype, accumulator = config.dtype, accumulator_dtype(config.dtype)
    shifted = x.astype(accumulator) + move
    operand = config.signs(shifted) if config.binary_input else shifted
    rows = operand.astype(dtype).reshape(-1, x.shape[-1])
    columns = gradient.astype(dtype).reshape(-1, gradient.shape[-1])
    to_matrix = jnp.matmul(rows.T, columns, preferred_element_type=accumulator)
    to_kernel = rule.gradient(kernel, to_matrix.reshape(kernel.shape).astype(kernel.dtype))

    weights = rule.quantize(kernel)
    scaled = (gradient * weights.scale).astype(dtype)
    to_shifted = jnp.matmul(scaled, weights.values.astype(dtype).T, preferred_element_type=accumulator)
    if config.binary_input:
        to_shifted *= config.estimator.slope(shifted)
    to_move = jnp.sum(to_shifted, axis=tuple(range(x.ndim - 1)))
    return to_shifted.astype(x.dtype), to_move.astype(move.dtype), to_kernel


binary_product.defvjp(_binary_product_forward, _binary_product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def binary_scores(
    q: Float[Array, "batch queries heads size"],
    k: Float[Array, "batch keys heads size"],
    config: ProductConfig,
) -> Float[Array, "batch heads queries keys"]:
    """Returns the products of the signs of queries and keys, head by head.

    They are integers, in the accumulator of ``config.dtype``.
    """
    return _binary_scores_forward(q, k, config)[0]


def _binary_scores_forward(q: Array, k: Array, config: ProductConfig) -> tuple[Array, tuple[Array, Array]]:
    signs = config.signs(q), config.signs(k)
    scores = jnp.einsum("bqhd,bkhd->bhqk", *signs, preferred_element_type=jnp.float32)
    if config.integer_products:
        scores = checkpoint_name(scores.astype(integer_dtype(q.shape[-1])), PRODUCT)
    return scores.astype(accumulator_dtype(config.dtype)), (q, k)


def _binary_scores_backward(
    config: ProductConfig, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    q, k = residuals
    dtype, sign = config.dtype, config.estimator.forward
    product = partial(jnp.einsum, preferred_element_type=accumulator_dtype(dtype))
    gradient = gradient.astype(dtype)
    to_q = product("bhqk,bkhd->bqhd", gradient, sign(k).astype(dtype))
    to_k = product("bhqk,bqhd->bkhd", gradient, sign(q).astype(dtype))
    return _through_sign(to_q, q, config.estimator), _through_sign(to_k, k, config.estimator)


binary_scores.defvjp(_binary_scores_forward, _binary_scores_backward)


def _through_sign(gradient: Array, x: Array, estimator: Estimator) -> Array:
    """Returns the gradient of ``x``, (batch, tokens, heads, size), from that of its sign.

    Heads are laid side by side meanwhile: the TPU compiler otherwise computes the slope in the layout of x
    and copies it, in float32, to that of the gradient.
    """
    tokens = *x.shape[:2], -1
    product = gradient.reshape(tokens) * estimator.slope(x.reshape(tokens))
    return product.reshape(x.shape).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def binary_context(
    codes: Float[Array, "batch heads queries keys"],
    v: Float[Array, "batch keys heads size"],
    config: ProductConfig,
) -> Float[Array, "batch queries heads size"]:
    """Returns the sums of the signs of the values that each query attends to, head by head.

    Codes are in {0, 1}. The sums are integers, in the accumulator of ``config.dtype``.
    """
    return _binary_context_forward(codes, v, config)[0]


def _binary_context_forward(
    codes: Array, v: Array, config: ProductConfig
) -> tuple[Array, tuple[Array, Array]]:
    context = jnp.einsum(
        "bhqk,bkhd->bqhd", codes.astype(CODE_DTYPE), config.signs(v), preferred_element_type=jnp.float32
    )
    if config.integer_products:
        # Heads side by side: a TPU would pad each of them.
        saved = context.astype(integer_dtype(v.shape[1])).reshape(*context.shape[:2], -1)
        context = checkpoint_name(saved, PRODUCT).reshape(context.shape)
    return context.astype(accumulator_dtype(config.dtype)), (codes, v)


def _binary_context_backward(
    config: ProductConfig, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    codes, v = residuals
    dtype = config.dtype
    product = partial(jnp.einsum, preferred_element_type=accumulator_dtype(dtype))
    gradient = gradient.astype(dtype)
    to_codes = product("bqhd,bkhd->bhqk", gradient, config.estimator.forward(v).astype(dtype))
    to_v = product("bhqk,bqhd->bkhd", codes.astype(dtype), gradient)
    return to_codes.astype(codes.dtype), _through_sign(to_v, v, config.estimator)


binary_context.defvjp(_binary_context_forward, _binary_context_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def code_product(
    a: Float[Array, "..."], b: Float[Array, "..."], equation: str, dtype: DTypeLike
) -> Float[Array, "..."]:
    """Returns the exact product of integers of magnitude at most 256, which bfloat16 holds.

    Args:
      a, b: codes, integers in any floating-point dtype.
      equation: for ``einsum``, such as "bqhd,bkhd->bhqk"; every index is in two of its three terms.
      dtype: compute dtype, of the products in the backward pass.

    Returns:
      Integers in the accumulator of ``dtype``.
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


def real_product(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """Returns ``x @ kernel`` in the accumulator of x's dtype."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=accumulator_dtype(x.dtype))
