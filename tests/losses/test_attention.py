"""The kinds of comparing attention, against NumPy and SciPy row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from bvit_jax.losses.attention import Ranking, attention_loss, row_correlation_loss, row_listwise_loss
from bvit_jax.losses.ranking import ranking_loss

KEY = jax.random.key(3)
SHAPE = (2, 3, 5, 9)


def probabilities(seed: int, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jnp.asarray(softmax(np.random.default_rng(seed).normal(size=shape), axis=-1))


@pytest.mark.usefixtures("x64")
def test_correlation_is_that_of_the_logarithms_of_each_row():
    student, teacher = probabilities(0), probabilities(1)
    loss = row_correlation_loss(student, teacher)
    for row in np.ndindex(SHAPE[:-1]):
        expected = 1 - np.corrcoef(np.log(student[row]), np.log(teacher[row]))[0, 1]
        np.testing.assert_allclose(loss[row], expected, rtol=1e-10)
    sharper = jax.nn.softmax(7 * jnp.log(student), axis=-1)
    np.testing.assert_allclose(row_correlation_loss(sharper, teacher), loss, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_keys_without_probability_do_not_count():
    student, teacher = probabilities(0), probabilities(1)
    masked = jnp.concatenate([teacher, jnp.full((*SHAPE[:-1], 3), 1e-40)], axis=-1)
    wider = jnp.concatenate([student, probabilities(2, (*SHAPE[:-1], 3))], axis=-1)
    np.testing.assert_allclose(
        row_correlation_loss(wider, masked), row_correlation_loss(student, teacher), rtol=1e-12
    )
    np.testing.assert_allclose(
        row_listwise_loss(wider, masked, 4), row_listwise_loss(student, teacher, 4), rtol=1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("top", [2, 5, 20])
def test_listwise_is_the_divergence_of_shares(top: int):
    student, teacher = probabilities(0), probabilities(1)
    loss = row_listwise_loss(student, teacher, top)
    for row in np.ndindex(SHAPE[:-1]):
        best = np.argsort(-teacher[row])[:top]
        np.testing.assert_allclose(loss[row], entropy(teacher[row][best], student[row][best]), rtol=1e-10)


@pytest.mark.parametrize("kind", ["correlation", "listwise"])
def test_uniform_attention_costs_more_than_the_right_order(kind: str):
    teacher = probabilities(1)
    uniform = jnp.full(SHAPE, 1 / SHAPE[-1])
    right = jax.nn.softmax(0.1 * jnp.log(teacher), axis=-1)  # nearly uniform
    losses = [attention_loss(Ranking(1.0, kind), [x], [teacher], KEY, 2) for x in (teacher, right, uniform)]
    assert abs(losses[0]) < 1e-5
    assert losses[0] <= losses[1] + 1e-5 < losses[2]
    gradient = jax.grad(lambda x: attention_loss(Ranking(1.0, kind), [x], [teacher], KEY, 2))(uniform)
    assert np.isfinite(gradient).all()
    assert np.vdot(gradient, teacher - uniform) < 0


def test_pairs_are_the_ranking_loss_of_the_chosen_images_and_layers():
    student, teacher = ([probabilities(seed + i) for i in range(2)] for seed in (0, 2))
    ranking = Ranking(1.0, margin=0.3, layers=(1,), every=2)
    expected = ranking_loss([student[1][:1]], [teacher[1][:1]], KEY, margin=0.3)
    assert attention_loss(ranking, student, teacher, KEY, 2) == expected


def test_heads_are_averaged_where_their_numbers_differ_and_layers_count_alike():
    ranking = Ranking(1.0, "correlation")
    wide, narrow = probabilities(0), probabilities(1, (2, 6, 5, 9))
    found = attention_loss(ranking, [wide, wide], [narrow, wide], KEY, 2)
    mean = row_correlation_loss(wide.mean(1), narrow.mean(1)).mean()
    np.testing.assert_allclose(found, (mean + 0) / 2, rtol=1e-4)
