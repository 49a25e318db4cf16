"""BatchNorm with PyTorch's running statistics, and LayerNorm.

Sums are in float32 (float64 if the input is), and so is what a norm returns.
"""

from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from bvit_jax.binary.products import accumulator_dtype
from bvit_jax.layers import closed_form
from bvit_jax.layers.closed_form import Channels, Vector

NormName = Literal["batch_norm", "layer_norm"]

MOMENTUM = 0.1  # weight of a new batch in the running statistics of a batch norm


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the last, with PyTorch's running statistics.

    The batch is normalised by its biased variance, and the running variance is the unbiased one, n / (n - 1),
    unlike that of linen's BatchNorm. Under jit over a sharded batch the statistics are those of the global
    batch. Returns the accumulator of the input's dtype.

    Attributes:
      epsilon: added to the variance.
      group: number of consecutive images that are normalised together, 0 for the whole batch. The running
        statistics then take the means over the groups of their means and unbiased variances. Normalising a
        group whose images are on one device needs no communication.
      one_pass: whether mean and variance are computed in one pass, relative to the running mean; see
        `bvit_jax.layers.closed_form.moments`.

    Raises:
      ValueError: ``group`` does not divide the batch, in training.
    """

    epsilon: float = 1e-5
    group: int = 0
    one_pass: bool = False

    @nn.compact
    def __call__(self, x: Channels, *, train: bool) -> Channels:
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        x = x.astype(accumulator_dtype(x.dtype))
        if not train:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            return x * factor + (bias - running_mean.value * factor)
        groups = self._groups(x.shape[0])
        shift = running_mean.value if self.one_pass else None
        if groups:
            y, mean, var = closed_form.grouped_batch_norm(x, scale, bias, self.epsilon, groups, shift)
            mean, var = jnp.mean(mean, axis=0), jnp.mean(var, axis=0)
        else:
            y, mean, var = closed_form.batch_norm(x, scale, bias, self.epsilon, shift)
        if not self.is_initializing():
            running = {"mean": running_mean.value, "var": running_var.value}
            count = x.size // x.shape[-1] // (groups or 1)
            running = advance_statistics(running, mean, var, count)
            running_mean.value, running_var.value = running["mean"], running["var"]
        return y

    def _groups(self, images: int) -> int:
        """Returns the number of groups in a batch, 0 where it is not divided."""
        if self.group and images % self.group:
            raise ValueError(f"group is {self.group}; expected a divisor of the {images} images in the batch")
        return images // self.group if self.group else 0


def advance_statistics(
    running: Mapping[str, Vector], mean: Vector, var: Vector, count: int
) -> dict[str, Vector]:
    """Returns the running statistics of a batch norm after another batch.

    Args:
      running: ``mean`` and ``var``, the latter unbiased.
      mean, var: of the batch, the latter biased.
      count: number of values per channel in the batch.
    """
    unbiased = var * (count / max(count - 1, 1))
    new = {"mean": mean, "var": unbiased}
    return {name: old + MOMENTUM * (new[name] - old) for name, old in running.items()}


class LayerNorm(nn.LayerNorm):
    """linen's LayerNorm with exact variance, called like `BatchNorm`; sums in float32 at least."""

    epsilon: float = 1e-5
    use_fast_variance: bool = False

    def __call__(self, x: Channels, *, train: bool = False) -> Channels:  # type: ignore[override]
        return super().__call__(x.astype(accumulator_dtype(x.dtype)))


def make_norm(
    norm: NormName, epsilon: float, name: str, group: int = 0, one_pass: bool = False
) -> BatchNorm | LayerNorm:
    """Returns a norm called ``name``; ``group`` and ``one_pass`` are those of `BatchNorm`."""
    if norm == "batch_norm":
        return BatchNorm(epsilon=epsilon, group=group, one_pass=one_pass, name=name)
    return LayerNorm(epsilon=epsilon, name=name)
