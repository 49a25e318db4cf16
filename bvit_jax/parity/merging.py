"""Bi-ViT's binary patch merging on a golden file of that module alone."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from bvit_jax.errors import UserError
from bvit_jax.layers.first_values import COLLECTIONS
from bvit_jax.models.bivit.release import SWIN_FAMILY
from bvit_jax.models.swin import PatchMerging
from bvit_jax.models.transformer import TransformerConfig
from bvit_jax.parity.golden import Arrays, GoldenFile, Row, compare
from bvit_jax.weights.formats import timm
from bvit_jax.weights.naming import BIVIT_SWIN
from bvit_jax.weights.state_dicts import Variables, from_state_dict, to_state_dict

CASE = "bivit_merging"


def check(golden: GoldenFile) -> Iterator[Row]:
    """Runs our module on the file in float64 and yields one row per group.

    Raises:
      UserError: the file holds something else.
    """
    height, width = _sides(golden.meta)
    x, to_y = golden.float64("x"), golden.float64("gy")
    if x.ndim != 3 or x.shape[1] != height * width or height % 2 or width % 2:
        raise UserError(f"its input is {x.shape}; expected {height}×{width} tokens, even numbers")
    grid = jnp.asarray(x.reshape(-1, height, width, x.shape[-1]))
    config = TransformerConfig(norm_epsilon=timm.SWIN_NORM_EPSILON, dtype=np.float64)
    module = PatchMerging(2 * x.shape[-1], config, SWIN_FAMILY.fields["layers"])
    abstract = jax.eval_shape(module.init, jax.random.key(0), grid)
    variables: Any = from_state_dict(golden.group("state"), abstract, np.float64, BIVIT_SWIN)

    y, variables = _first_batch(module, variables, grid)
    yield compare("first output", {"": y}, {"": golden.array("init/y")})
    state = to_state_dict(variables, BIVIT_SWIN)
    yield compare_first_state(golden, state)

    variables = from_state_dict(state | golden.group("state2"), abstract, np.float64, BIVIT_SWIN)

    if to_y.shape != y.shape:
        raise UserError(f"its gradient of the output is {to_y.shape}; expected {y.shape}")
    y, (to_params, to_grid) = _output_and_gradients(module, variables, grid, to_y)
    yield compare("output", {"": y}, {"": golden.array("y")})
    yield compare("gradients", to_state_dict({"params": to_params}, BIVIT_SWIN), golden.group("grad"))
    yield compare("input gradient", {"x": to_grid.reshape(x.shape)}, golden.group("grad_input"))


@functools.partial(jax.jit, static_argnums=0)
def _first_batch(module: nn.Module, variables: Variables, grid: Array) -> Any:
    return module.apply(variables, grid, first_batch=True, mutable=list(COLLECTIONS))


@functools.partial(jax.jit, static_argnums=0)
def _output_and_gradients(module: nn.Module, variables: Variables, grid: Array, to_y: Any) -> Any:
    def output(params: Any, grid: Array) -> Any:
        return module.apply(variables | {"params": params}, grid)

    y, pullback = jax.vjp(output, variables["params"], grid)
    return y, pullback(to_y)


def compare_first_state(golden: GoldenFile, state: Arrays) -> Row:
    """Compares the quantisers after the first batch, as far as the file holds them."""
    theirs = golden.group("init_state")
    return compare("first state", {name: a for name, a in state.items() if name in theirs}, theirs)


def _sides(meta: Mapping[str, Any]) -> tuple[int, int]:
    try:
        height, width = map(int, meta["input_resolution"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the golden file's meta has no or an unknown {error}") from error
    return height, width
