"""The real-valued models: Swin's windows against slow loops, sizes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.models.windows import MASKED, Window, relative_positions, shift_mask


def origin_of_tokens(window):
    """Returns (y, x) in the grid of each token of each window, one by one."""
    tokens = []
    for top in range(0, window.side, window.size):
        for left in range(0, window.side, window.size):
            for y in range(top, top + window.size):
                for x in range(left, left + window.size):
                    tokens.append(((y + window.shift) % window.side, (x + window.shift) % window.side))
    return np.array(tokens).reshape(-1, window.size**2, 2)


WINDOWS = [Window(8, 4, 2), Window(14, 7, 3), Window(6, 3, 1), Window(6, 2, 0), Window(4, 4, 0)]


@pytest.mark.parametrize("window", WINDOWS)
def test_splitting_and_joining(window):
    x = np.arange(2 * window.side**2 * 3).reshape(2, window.side**2, 3)
    windows = window.split(jnp.array(x))
    grid = x.reshape(2, window.side, window.side, 3)
    y, x_ = np.moveaxis(origin_of_tokens(window), -1, 0)
    np.testing.assert_array_equal(windows, grid[:, y, x_].reshape(windows.shape))
    np.testing.assert_array_equal(window.join(windows), x)


@pytest.mark.parametrize("window", [w for w in WINDOWS if w.shift])
def test_only_neighbours_attend(window):
    mask = shift_mask(window)
    for tokens, allowed in zip(origin_of_tokens(window), mask == 0, strict=True):
        # Tokens of one window that lie less than a window apart in the grid are real neighbours.
        distance = np.abs(tokens[:, None] - tokens).max(-1)
        np.testing.assert_array_equal(allowed, distance < window.size)
    assert set(np.unique(mask)) == {0.0, np.float32(MASKED)}


def test_relative_positions():
    index = relative_positions(3)
    y, x = np.divmod(np.arange(9), 3)
    for q in range(9):
        for k in range(9):
            assert index[q, k] == (y[q] - y[k] + 2) * 5 + (x[q] - x[k] + 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 100}, "image_size is 100: stage 0 has a 25×25 token grid"),
        ({"window_size": 6}, "windows of 6 must divide"),
        ({"num_heads": (3, 6)}, r"num_heads is \(3, 6\): expected 4 positive whole numbers"),
        ({"num_heads": (5, 6, 12, 24)}, "width is 96: expected a multiple of its 5 heads"),
        ({"depth": ()}, r"depth is \(\): expected one depth per stage"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0: expected a positive whole number"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        models.create_model(models.model_config("swin", **settings))


def test_a_distillation_head_needs_its_token():
    with pytest.raises(UserError, match="it reads the distillation token"):
        models.create_model(models.model_config("deit", distillation_head=True))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"name": "swin"}, 28_288_354),
        ({"name": "swin", "depth": (2, 2, 18, 2)}, 49_606_258),
        ({"name": "deit", "distillation_token": True, "distillation_head": True}, 22_436_432),
    ],
)
def test_parameters_are_as_many_as_published(settings, count):
    model = models.create_model(models.model_config(**settings))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert models.num_params(shapes["params"]) == count
