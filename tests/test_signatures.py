"""Where signatures say shapes and dtypes, the tests refuse others, also those that would broadcast."""

import jax.numpy as jnp
import jaxtyping
import pytest

from bvit_jax.augment import Normalization
from bvit_jax.binary import ProductConfig, binary_scores
from bvit_jax.layers.closed_form import rprelu
from bvit_jax.losses import cross_entropy
from bvit_jax.models.windows import Window
from bvit_jax.optim import global_norm
from tests.conftest import CHECKED

WRONG = {
    "augment": lambda: Normalization((0.5,) * 3, (0.5,) * 3)(jnp.zeros((8, 8, 3))),  # one image, no batch
    "binary": lambda: binary_scores(
        jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 5, 1, 8)), ProductConfig(jnp.float32)
    ),
    "layers": lambda: rprelu(jnp.zeros((2, 5, 8)), *(jnp.zeros(1) for _ in range(3))),
    "losses": lambda: cross_entropy(jnp.zeros((4, 10)), jnp.zeros((1, 10))),
    "models.windows": lambda: Window(8, 4, 0).split(jnp.zeros((1, 256, 3))),
    "optim": lambda: global_norm({"kernel": jnp.zeros(3, int)}),
}


@pytest.mark.parametrize("room", CHECKED)
def test_a_wrong_call_is_refused(room):
    with pytest.raises(jaxtyping.TypeCheckError):
        WRONG[room]()
