"""The layers in a Flax model of one's own, by their public names."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from bvit_jax import binary, layers


class Own(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        x = layers.BinaryPatchConv(8, 2, estimator=binary.CLIP, name="patches")(images)
        x = layers.RPReLU()(layers.BatchNorm()(x, train=train))
        return layers.BinaryDense(4, estimator=binary.TANH, name="dense")(x)


def test_a_model_of_ones_own():
    images, key = jnp.ones((2, 4, 6, 3)), jax.random.key(0)
    with layers.noted_kernels() as kernels:
        variables = Own().init(key, images, train=False)
    assert kernels == {("patches",): binary.CONV, ("dense",): binary.DENSE}
    assert Own().apply(variables, images, train=False).shape == (2, 6, 4)
