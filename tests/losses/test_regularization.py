"""The term that draws latent weights to ±1, alone and in the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bvit_jax import config as config_lib
from bvit_jax.configs import bivit_digits, deit_digits
from bvit_jax.errors import UserError
from bvit_jax.losses.regularization import Regularization, block_kernels, distance_to_one
from bvit_jax.models.head import ModelOutput
from bvit_jax.training.steps.state import create_state
from tests.small import CLASSES, NORMALIZE, SIZE, batch_of, make_train_step, optimizer, wide

pytestmark = pytest.mark.usefixtures("x64")


class Blocks(nn.Module):
    """Two blocks of a dense layer, and a head."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images.reshape(images.shape[0], -1).astype(jnp.float64)
        for i in range(2):
            x = jnp.tanh(nn.Dense(6, dtype=jnp.float64, name=f"block{i}")(x))
        logits = nn.Dense(CLASSES, dtype=jnp.float64, name="head")(x)
        return ModelOutput(logits, (logits,))


def test_every_matrix_counts_the_same_and_zero_has_no_slope():
    kernels = [jnp.array([[0.5, -3.0], [1.0, 0.0]]), jnp.array([-0.25])]
    value, gradients = jax.value_and_grad(distance_to_one)(kernels)
    assert value == ((0.5 + 2 + 0 + 1) / 4 + 0.75) / 2
    np.testing.assert_array_equal(gradients[0], np.array([[-1, -1], [0, 0]]) / 8)
    np.testing.assert_array_equal(gradients[1], [0.5])


def test_the_kernels_of_blocks_are_drawn_and_no_others():
    params = {
        "block0": {"mlp": {"kernel": jnp.ones(1), "scale": 2}},
        "stage1_block0": {"query": {"dense": {"kernel": jnp.ones(3)}}},
        **{name: {"kernel": jnp.ones(4)} for name in ("embedding", "downsample1", "head")},
    }
    assert [kernel.size for kernel in block_kernels(params)] == [1, 3]


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("distillation", "step", "weights"),  # of teacher, labels and regularisation
    [
        (0.9, 3, (0.9, 0.0, 0.1)),
        (0.8, 3, (0.8, 0.1, 0.1)),
        (0.8, 2, (0.8, 0.2, 0.0)),
        (0.0, 3, (0.0, 0.9, 0.1)),
    ],
)
def test_the_loss_of_a_step(distillation, step, weights, k):
    """The sum of the terms that count at this step, over one microbatch or two; the gradient follows."""
    first_step = 0 if distillation == 0.9 else 3
    model, adam = Blocks(), optimizer()
    state = wide(create_state(jax.random.key(0), model, adam, SIZE)).replace(step=jnp.array(step))
    teacher = {"teacher": model} if distillation else {}
    taught = wide(model.init(jax.random.key(3), jnp.zeros((1, SIZE, SIZE, 3))))
    objective = {"distillation_weight": distillation, "label_smoothing": 0.0, **teacher}
    batch = batch_of(4)
    found, metrics = jax.jit(
        make_train_step(
            model,
            adam,
            NORMALIZE,
            accumulate_steps=k,
            regularization=Regularization(0.1, first_step),
            **objective,
        )
    )(state, batch, taught, jax.random.key(1))

    images = NORMALIZE(jnp.asarray(batch["image"]))

    def loss(params):
        logits = jax.nn.log_softmax(model.apply({"params": params}, images).logits)
        target = jax.nn.softmax(model.apply(taught, images).logits)
        labels = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)
        kernels = [params[f"block{i}"]["kernel"] for i in range(2)]
        terms = -jnp.mean(jnp.sum(target * logits, axis=1)), -jnp.mean(labels), distance_to_one(kernels)
        return sum(weight * term for weight, term in zip(weights, terms, strict=True)), terms

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
    np.testing.assert_allclose(metrics["regularization_loss"], terms[2], rtol=1e-12)
    assert ("label_loss" in metrics) == (distillation != 0.9)
    updates, _ = adam.update(gradient, state.opt_state, state.params)
    jax.tree.map(
        lambda found, old, update: np.testing.assert_allclose(found, old + update, atol=1e-12),
        found.params,
        state.params,
        updates,
    )


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (bivit_digits, {"regularization_weight": 0.6}, "config.loss.regularization_weight is 0.6 and"),
        (bivit_digits, {"regularization_start": 0.9}, "config.loss.regularization_start is 0.9 and"),
        (
            deit_digits,
            {"regularization_weight": 0.1, "distillation_weight": 0.0},
            "config.loss.regularization_weight is 0.1, and deit has no binary weights; set it to 0",
        ),
    ],
)
def test_what_does_not_fit_is_named(module, settings, message):
    config = module.get_config()
    config.loss.update(settings)
    with pytest.raises(UserError) as error:
        config_lib.validate(config)
    assert str(error.value).startswith(message)
