"""Initialisers of weight matrices: PyTorch's defaults, and the truncated normal."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn.initializers import Initializer

WeightInit = Literal["torch", "trunc_normal"]


@functools.cache
def torch_uniform(fan_in: int) -> Initializer:
    """Returns PyTorch's default initialiser of a linear or convolution layer with ``fan_in`` inputs.

    It is uniform on ±1/sqrt(fan_in), for the weights and for the bias.
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None) -> Array:
        dtype = jnp.zeros((), dtype).dtype  # None: the default dtype
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


# PyTorch's trunc_normal_ truncates at ±2, a hundred of these standard deviations: no draw is that large.
normal_init = nn.initializers.normal(0.02)


def kernel_init(weight_init: WeightInit, fan_in: int) -> Initializer:
    """Returns the initialiser of a weight matrix."""
    return torch_uniform(fan_in) if weight_init == "torch" else normal_init


def bias_init(weight_init: WeightInit, fan_in: int) -> Initializer:
    """Returns the initialiser of the bias that goes with `kernel_init`."""
    return torch_uniform(fan_in) if weight_init == "torch" else nn.initializers.zeros
