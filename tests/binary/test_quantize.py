"""Quantisers against PyTorch, against slow formulations, and at the edges of their rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from bvit_jax.binary import quantize

pytestmark = pytest.mark.usefixtures("x64", "strict")

INF, NAN = np.inf, np.nan


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def forward_and_gradients(function, gradient, *arguments):
    """Returns the value of ``function`` and what each argument gets from the output's gradient."""
    y, transpose = jax.vjp(function, *arguments)
    return y, *transpose(jnp.asarray(gradient, y.dtype))


def assert_close(actual, expected, tolerance=None):
    """Compares relative to the largest magnitude, as golden files are."""
    expected = np.asarray(expected)
    if tolerance is None:
        tolerance = 1e-10 if expected.dtype == np.float64 else 1e-6
    assert np.shape(actual) == expected.shape
    scale = np.max(np.abs(expected)) or 1
    assert np.max(np.abs(np.asarray(actual, np.float64) - expected)) <= tolerance * scale


def assert_same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


# --- against PyTorch ---------------------------------------------------------------------------


def test_sign_equals_torch(units):
    y, gx = forward_and_gradients(quantize.sign, units["sign/gy"], jnp.array(units["sign/x"]))
    assert_same(y, units["sign/y"])
    assert_close(gx, units["sign/gx"])


def test_probs_equal_torch(units):
    y, gp, ga = forward_and_gradients(
        quantize.binarize_probs,
        units["prob/gy"],
        jnp.array(units["prob/x"]),
        jnp.array(units["prob/clip"]),
    )
    assert_close(y, units["prob/y"])
    assert_close(gp, units["prob/gx"])
    assert_close(ga, units["prob/gclip"])


CLIP = 2.5
MANY_BITS = {
    "twn2": lambda w, by_row: quantize.ternarize(w, CLIP, by_row=by_row),
    "sym4": lambda w, by_row: quantize.quantize_symmetric(w, CLIP, 4, by_row=by_row),
    "sym8": lambda w, by_row: quantize.quantize_symmetric(w, CLIP, 8, by_row=by_row),
    "asym4": lambda w, by_row: quantize.quantize_asymmetric(w, CLIP, 4, by_row=by_row),
}


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", MANY_BITS)
def test_weights_of_many_bits_equal_torch(units, name, by_row):
    case = f"{name}_{'row' if by_row else 'layer'}"
    w, gy, y, gw = (units[f"{case}/{array}"].T for array in ("w", "gy", "y", "gw"))
    ours, gradient = forward_and_gradients(lambda w: MANY_BITS[name](w, by_row), gy, jnp.array(w))
    assert_close(ours, y)
    assert_same(gradient, gw)


# --- against slow formulations -----------------------------------------------------------------
# Autodiff makes the gradients here: stop_gradient hides what the estimators ignore.


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def slow_sign(x):
    parabola = jnp.where(x < 0, 2 * x + x**2, 2 * x - x**2)
    smooth = jnp.where(jnp.abs(x) < 1, parabola, stop_gradient(jnp.sign(x)))
    return smooth + stop_gradient(jnp.sign(x) - smooth)


def slow_probs(probs, scale):
    q = probs / scale
    rounded = q + stop_gradient(jnp.round(q) - q)
    return scale * jnp.where(q < 0, 0.0, jnp.where(q > 1, 1.0, rounded))


def clipped(x, bound, closed):
    """Returns ``x`` clipped to ±bound, with the gradient of the closed or open interval."""
    inside = jnp.abs(x) <= bound if closed else jnp.abs(x) < bound
    return jnp.where(inside, x, stop_gradient(jnp.clip(x, -bound, bound)))


def slow_one_bit(kernel, centre):
    axes = tuple(range(kernel.ndim - 1))
    w = kernel - jnp.mean(kernel, axes) if centre else kernel
    smooth = clipped(w, 1.0, closed=True)
    hard = jnp.sign(w) * jnp.mean(jnp.abs(kernel), axes)
    return smooth + stop_gradient(hard - smooth)


def slow_many_bits(values, w, by_row):
    """Returns a straight-through function of ``w``; ``values`` works on one row or tensor."""
    rows = np.clip(w, -CLIP, CLIP)
    rows = rows.reshape(-1, w.shape[-1]).T if by_row else rows.reshape(1, -1)
    hard = np.stack([values(row) for row in rows])
    hard = hard.T.reshape(w.shape) if by_row else hard.reshape(w.shape)

    def straight_through(w):
        smooth = clipped(w, CLIP, closed=False)
        return smooth + stop_gradient(hard - smooth)

    return straight_through


def ternary_values(row):
    kept = [abs(value) for value in row if abs(value) > 0.7 * np.mean(np.abs(row))]
    level = sum(kept) / len(kept)
    return np.array([np.sign(v) * level if abs(v) in kept else 0 for v in row])


def symmetric_values(bits):
    return lambda row: np.array(
        [
            round(v / max(abs(row)) * (2 ** (bits - 1) - 1)) * max(abs(row)) / (2 ** (bits - 1) - 1)
            for v in row
        ]
    )


def asymmetric_values(bits):
    def values(row):
        step = (max(row) - min(row) + 1e-8) / (2**bits - 1)
        return np.array([round((v - min(row)) / step) * step + min(row) for v in row])

    return values


def check_against(slow, fast, *arguments):
    arguments = [jnp.asarray(a) for a in arguments]
    gradient = numbers(*np.shape(fast(*arguments)), seed=9)
    for ours, theirs in zip(
        forward_and_gradients(fast, gradient, *arguments),
        forward_and_gradients(slow, gradient, *arguments),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_sign_equals_slow_formulation():
    check_against(slow_sign, quantize.sign, numbers(200))


@pytest.mark.parametrize("scale", [0.005, 0.3, 2.0])
def test_probs_equal_slow_formulation(scale):
    probs = np.abs(numbers(4, 50)) * scale
    check_against(slow_probs, quantize.binarize_probs, probs, scale)


def test_codes_times_scale_are_the_probs_and_their_gradient():
    # The product with the scale may come after any linear map, which is how the models use it.
    probs, scale, values = np.abs(numbers(5, 8)), 0.7, numbers(8, 3, seed=1)

    def after(probs, scale):
        return (quantize.prob_codes(probs, scale) @ values) * stop_gradient(scale)

    check_against(lambda p, s: slow_probs(p, s) @ values, after, probs, scale)


def test_one_bit_weights_equal_slow_formulation():
    dense, conv = numbers(20, 6), numbers(2, 2, 5, 6)
    check_against(lambda w: slow_one_bit(w, centre=True), quantize.binarize_dense, dense)
    check_against(lambda w: slow_one_bit(w, centre=False), quantize.binarize_conv, conv)


SLOW_VALUES = {
    "twn2": ternary_values,
    "sym4": symmetric_values(4),
    "sym8": symmetric_values(8),
    "asym4": asymmetric_values(4),
}


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", MANY_BITS)
@pytest.mark.parametrize("shape", [(20, 6), (2, 2, 3, 4)])
def test_weights_of_many_bits_equal_slow_formulation(name, by_row, shape):
    w = 1.5 * numbers(*shape)  # some beyond the clip
    assert np.abs(w).max() > CLIP
    slow = slow_many_bits(SLOW_VALUES[name], w, by_row)
    check_against(slow, lambda w: MANY_BITS[name](w, by_row), w)


# --- the table of edge rules, row by row -------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_edges_of_sign(dtype):
    x = jnp.array([0.0, -0.0, -1.0, 1.0, -INF, INF, 1e-30, -1e-30, 3.0], dtype)
    y, gx = forward_and_gradients(quantize.sign, np.ones(9), x)
    assert y.dtype == gx.dtype == dtype
    assert_same(y.astype(float), [0, 0, -1, 1, -1, 1, 1, -1, 1])
    assert_same(gx.astype(float), [2, 2, 0, 0, 0, 0, 2, 2, 0])


@pytest.mark.parametrize("function", [quantize.sign_bit, quantize.weight_bit])
def test_a_bit_holds_no_zero(function):
    x = jnp.array([-INF, -1.5, -1.0, -0.5, -0.0, 0.0, 1e-300, 0.5, 1.0, 1.5, INF, NAN])
    y, gx = forward_and_gradients(function, np.ones(12), x)
    assert_same(y, [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, NAN])
    parabola, window = [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert_same(gx[:-1], parabola if function is quantize.sign_bit else window)


def test_a_floor_lets_go_of_what_fell_below():
    x = jnp.array([-1.0, 0.1, 0.2, 3.0])
    y, up, floor = forward_and_gradients(quantize.above, np.full(4, -1.0), x, jnp.array(0.1))
    assert_same(y, [0.1, 0.1, 0.2, 3.0])
    assert_same(up, [-1, -1, -1, -1])  # a descent raises them
    assert floor == 0
    _, down, _ = forward_and_gradients(quantize.above, np.ones(4), x, jnp.array(0.1))
    assert_same(down, [0, 0, 1, 1])


def test_codes_with_a_scale_for_each_head_are_those_of_each_head():
    rng = np.random.default_rng(0)
    probs, gradient = jnp.array(rng.uniform(0, 1, (2, 3, 4, 5))), jnp.array(rng.normal(size=(2, 3, 4, 5)))
    scales = jnp.array([0.2, 0.5, 0.9])
    actual = forward_and_gradients(quantize.prob_codes, gradient, probs, scales[:, None, None])
    assert actual[2].shape == (3, 1, 1)
    for head in range(3):
        y, gp, ga = forward_and_gradients(
            quantize.prob_codes, gradient[:, head], probs[:, head], scales[head]
        )
        assert_same(actual[0][:, head], y)
        assert_close(actual[1][:, head], gp)
        assert_close(actual[2][head, 0, 0], ga)


def test_edges_of_prob_codes():
    scale = jnp.array(0.25)
    ratio = np.array([0, 0.5, 1, 1.5, 2.5, -0.25, np.nextafter(0.5, 1), np.nextafter(1, 2), INF])
    probs = jnp.array(ratio * 0.25)
    y, gp, ga = forward_and_gradients(quantize.prob_codes, np.ones(9), probs, scale)
    assert_same(y, [0, 0, 1, 1, 1, 0, 1, 1, 1])
    assert_same(gp, np.array([1, 1, 1, 0, 0, 0, 1, 0, 0]) / 0.25)
    assert np.isfinite(ga)

    def scale_gradient(index):
        one = jnp.zeros(9).at[index].set(1.0)
        return float(forward_and_gradients(quantize.binarize_probs, one, probs, scale)[2])

    expected = [0, -0.5, 0, 1, 1, 0, 0.5, 1, 1]  # round(q) - q inside, 1 above, 0 below
    np.testing.assert_allclose([scale_gradient(i) for i in range(9)], expected, atol=1e-15)


def test_probs_round_half_to_even():
    # 0.5 -> 0 is the only tie inside [0, 1]; 1.5 and 2.5 both end at the last code.
    y = quantize.binarize_probs(jnp.array([0.5, 1.5, 2.5]), jnp.array(1.0))
    assert_same(y, [0, 1, 1])


def test_edges_of_binarize_dense():
    # Column 0: one weight at the row mean 2. Column 1: the centred weights are -1, 2, -1.
    kernel = jnp.array([[1.0, 0], [2, 3], [3, 0]])
    gradient = np.array([[1.0, 1], [2, 7], [6, 3]])
    y, gw = forward_and_gradients(quantize.binarize_dense, gradient, kernel)
    assert_same(y, [[-2, -1], [0, 1], [2, -1]])
    masked = np.array([[1.0, 1], [2, 0], [6, 3]])  # ±1 is inside, 2 is not
    np.testing.assert_allclose(gw, masked - masked.mean(axis=0), rtol=1e-15)


def test_edges_of_binarize_conv():
    values = [0.0, 1.0, -1.0, np.nextafter(1, 2), -np.nextafter(1, 2), 2.0]
    kernel = jnp.array(values).reshape(1, 2, 3, 1)
    y, gw = forward_and_gradients(quantize.binarize_conv, np.ones(kernel.shape), kernel)
    assert_same(y.ravel() / jnp.mean(jnp.abs(kernel)), [0, 1, -1, 1, -1, 1])
    assert_same(gw.ravel(), [1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ternarize_drops_weights_at_the_threshold(dtype):
    w = jnp.array([7, -7, 13, -13], dtype)  # the mean magnitude is 10
    assert_same(quantize.ternarize(w, 100.0), [0, 0, 13, -13])


@pytest.mark.parametrize("name", MANY_BITS)
def test_gradient_of_many_bits_stops_at_the_clip(name):
    inside = np.nextafter(CLIP, 0)
    w = jnp.array([[CLIP, -CLIP], [inside, -inside], [3.0, -INF], [0.0, 1.0]])
    y, gw = forward_and_gradients(lambda w: MANY_BITS[name](w, False), np.full((4, 2), 3.0), w)
    assert_same(gw, [[0, 0], [3, 3], [0, 0], [3, 3]])
    assert np.abs(y).max() <= CLIP + 1e-8


def test_symmetric_rounds_half_to_even():
    w = jnp.array([3.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])  # 3 bits: the levels are -3 to 3
    assert_same(quantize.quantize_symmetric(w, 100.0, 3), [3, 0, 2, 2, 0, -2, -2])


def test_asymmetric_rounds_half_to_even():
    w = jnp.array([0.0, 0.5, 1.5, 2.5, 3.0], jnp.float32)  # 2 bits: the levels are 0 to 3
    assert_same(quantize.quantize_asymmetric(w, 100.0, 2), [0, 0, 2, 2, 3])


ALL = {
    "sign": quantize.sign,
    "probs": lambda x: quantize.binarize_probs(x, jnp.array(0.5)),
    "dense": quantize.binarize_dense,
    "conv": quantize.binarize_conv,
    **{name: lambda w, q=q: q(w, False) for name, q in MANY_BITS.items()},
    **{f"{name}_by_row": lambda w, q=q: q(w, True) for name, q in MANY_BITS.items()},
}


@pytest.mark.parametrize("name", ALL)
def test_zeros_give_zeros(name):
    y, gw = forward_and_gradients(ALL[name], np.ones((4, 3)), jnp.zeros((4, 3)))
    assert_same(y, np.zeros((4, 3)))
    assert np.isfinite(gw).all()


@pytest.mark.parametrize("name", ALL)
def test_nan_is_not_hidden(name):
    y = ALL[name](jnp.array([[1.0, 0.2], [NAN, 0.3], [0.5, -0.4]]))
    assert np.isnan(y[1, 0])
    if name in ("sign", "probs") or name.endswith("_by_row"):
        assert np.isfinite(y[:, 1]).all()


def test_nan_reaches_the_gradient_of_sign():
    assert np.isnan(jax.grad(quantize.sign)(NAN))


@pytest.mark.parametrize("value", [0.5, -3.0])
def test_constant_weights_are_kept(value):
    w = jnp.full((4, 3), value)
    for quantizer in MANY_BITS.values():
        expected = np.clip(value, -CLIP, CLIP)
        assert_close(quantizer(w, True), np.full((4, 3), expected), 1e-7)


# --- the rule of the models --------------------------------------------------------------------


def test_quantize_weight_chooses_by_bits():
    w = jnp.array(numbers(6, 4))
    assert quantize.quantize_weight(w, 32, CLIP) is w
    assert_same(quantize.quantize_weight(w, 2, CLIP), quantize.ternarize(w, CLIP))
    for bits in range(3, 9):
        y = quantize.quantize_weight(w, bits, CLIP)
        assert_same(y, quantize.quantize_symmetric(w, CLIP, bits))
        assert len(np.unique(y)) <= 2**bits - 1


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_quantize_weight_refuses_other_bits(bits):
    with pytest.raises(ValueError, match=f"weight bits are {bits}"):
        quantize.quantize_weight(jnp.ones((2, 2)), bits, CLIP)
