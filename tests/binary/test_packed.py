"""Packed signs and the feed-forward branch computed with them, against the plain computation."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from bvit_jax import models
from bvit_jax.binary import bits
from bvit_jax.models.blocks import BinaryFeedForward, BlockConfig
from bvit_jax.models.execution import packed_feed_forward
from bvit_jax.runtime import allocator

TINY = models.model_config(
    "binaryvit",
    image_size=16,
    patch_size=4,
    num_classes=5,
    width=(8,),
    depth=(2,),
    num_heads=(1,),
    mlp_dim=(16,),
    reduction=(2,),
    pool_branches=(),
)


pytestmark = pytest.mark.usefixtures("x64")


def values(*shape: int, seed: int = 0, zeros: bool = False) -> Array:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    return jnp.asarray(np.where(rng.random(shape) < 0.1, 0, x) if zeros else x)


def close(a: object, b: object, tolerance: float = 1e-12) -> None:
    """Compares trees, each array to a share of its largest value."""

    def compare(a: Array, b: Array) -> None:
        largest = max(np.abs(b).max(), 1e-2)  # some gradients are zero but for rounding
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)

    jax.tree.map(compare, a, b)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("channels", [1, 8, 32, 45, 64, 200])
def test_product_is_that_of_the_signs(channels: int, zeros: bool) -> None:
    a, b = (values(channels, n, seed=n, zeros=zeros) for n in (7, 11))
    expected = np.sign(a).T @ np.sign(b)
    packed = bits.pack(a), bits.pack(b)
    assert [bool(p.zeros) for p in packed] == [bool((x == 0).any()) for x in (a, b)]

    def signs() -> tuple[Array, Array]:
        return jnp.sign(a), jnp.sign(b)

    y = bits.product(*packed, signs)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, expected)
    doubled = bits.product(*packed, signs, lambda y: 2.0 * y.astype(float))
    np.testing.assert_array_equal(doubled, 2 * expected)


def test_packed_bits() -> None:
    x = jnp.asarray([[1.0], [-2.0], [jnp.nan], [jnp.inf], [-jnp.inf]])
    packed = bits.pack(jnp.concatenate([x, jnp.ones((11, 1)), x]))
    assert packed.negative.dtype == jnp.uint32
    assert packed.negative.tolist() == [[0b10010 << 16 | 0b10010]]
    assert not packed.zeros
    for zero in (0.0, -0.0):
        assert bits.pack(jnp.full((16, 3), zero)).zeros  # every sign of half a word
        assert bits.pack(x.at[4, 0].set(zero)).zeros


def feed_forward(mlp_dim: int, pack: bool) -> BinaryFeedForward:
    return BinaryFeedForward(mlp_dim, BlockConfig(dtype=jnp.float64, execution=models.Execution(packed=pack)))


def trained(module: BinaryFeedForward, variables: dict, x: Array, weights: Array) -> tuple:
    """Returns output, gradients for parameters and input, and new statistics."""

    def loss(params: dict, x: Array) -> tuple:
        given = {**variables, "params": params}
        y, updates = module.apply(given, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * weights), (y, updates)

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (y, updates)), gradients = step(variables["params"], x)
    return y, gradients, updates


def evaluated(module: BinaryFeedForward, variables: dict, x: Array) -> Array:
    return jax.jit(lambda variables, x: module.apply(variables, x, train=False))(variables, x)


def initial(module: Any, x: Array) -> dict:
    """Returns the variables of a module, each moved away from its initial value."""
    variables = jax.jit(lambda: module.init(jax.random.key(0), x, train=True))()
    leaves, tree = jax.tree.flatten(variables)
    new = [leaf * 1.1 + 0.3 * values(*leaf.shape, seed=i) ** 2 for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, new)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "mlp_dim", "rows"), [(8, 16, 16), (8, 16, 10**6), (40, 80, 50)])
def test_feed_forward_equals_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, width: int, mlp_dim: int, rows: int
) -> None:
    """In one part, in parts, and where the rows asked for do not divide the tokens."""
    monkeypatch.setattr(packed_feed_forward, "WIDE_VALUES", rows * mlp_dim)
    monkeypatch.setattr(packed_feed_forward, "NARROW_ROWS", rows)
    x, weights = values(4, 25, width, zeros=True), values(4, 25, width, seed=1)
    plain, fast = (feed_forward(mlp_dim, pack) for pack in (False, True))
    variables = initial(plain, x)
    close(trained(fast, variables, x, weights), trained(plain, variables, x, weights))
    close(evaluated(fast, variables, x), evaluated(plain, variables, x))
    text = jax.jit(lambda v, x: fast.apply(v, x, train=False)).lower(variables, x).as_text()
    assert "popcnt" in text


@pytest.mark.slow
def test_weights_that_are_zero() -> None:
    """A weight at the mean of its row has the sign 0, which one bit does not hold; and a row of zeros."""
    x, weights = values(4, 25, 8), values(4, 25, 8, seed=1)
    plain, fast = (feed_forward(16, pack) for pack in (False, True))
    variables = initial(plain, x)
    kernel = np.array(variables["params"]["expand"]["dense"]["kernel"])
    kernel[:, 3] = [-1, 0, 1, 0, 0.5, -0.5, 0.25, -0.25]
    kernel[:, 5] = 0
    variables["params"]["expand"]["dense"]["kernel"] = jnp.asarray(kernel)
    close(trained(fast, variables, x, weights), trained(plain, variables, x, weights))
    close(evaluated(fast, variables, x), evaluated(plain, variables, x))
    kernel[:, 6] *= 1e-200  # whose square is zero
    variables["params"]["expand"]["dense"]["kernel"] = jnp.asarray(kernel)
    close(evaluated(fast, variables, x), evaluated(plain, variables, x))


def test_statistics_are_not_rounded_on_accelerators() -> None:
    def statistics(x: Array, kernel: Array) -> tuple:
        unit = packed_feed_forward.Unit(jnp.zeros(8), kernel, *5 * (jnp.ones(16),))
        signs = packed_feed_forward._signs(x, unit)
        return packed_feed_forward._moments_of_product(signs, unit, 25)

    text = jax.jit(statistics).lower(values(25, 8), values(8, 16)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"weight_bits": 2}, 36),
        ({"act_bits": 32}, 36),
        ({"norm": "layer_norm"}, 36),
        ({"batch_norm_group": 2}, 36),
        ({"dtype": jnp.bfloat16}, 36),
        ({}, 4),  # too few to pay
        ({}, 36),
    ],
)
def test_what_is_packed_in_training(settings: dict, tokens: int) -> None:
    execution = models.Execution(packed=True)
    module = BinaryFeedForward(32, BlockConfig(**{"dtype": jnp.float64, "execution": execution, **settings}))
    x = values(4, tokens, 8)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=True))
    train = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))
    assert ("popcnt" in train.lower(variables, x).as_text()) == (not settings and tokens == 36)


@pytest.mark.slow
@pytest.mark.usefixtures("promotion")
def test_model_equals_the_plain_one() -> None:
    """In a scan over its blocks with rematerialisation, as on one CPU."""
    images = values(2, 16, 16, 3)
    plain = models.create_model(TINY, jnp.float64)
    fast = models.create_model(
        TINY, jnp.float64, models.Execution(packed=True, scan_blocks=True, remat="block")
    )
    variables = initial(plain, images)

    def run(model: object) -> tuple:
        def loss(params: dict) -> tuple:
            output, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(output.logits)), (output.logits, updates)

        (_, aux), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
        return aux, gradients, jax.jit(model.apply)(variables, images).logits

    close(run(fast), run(plain), 1e-10)


STEPS = """
import resource
import jax, jax.numpy as jnp, numpy as np
from bvit_jax.runtime.allocator import keep_freed_memory

def faults_of_the_last(action, times):
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def touch_more_than_an_integer_counts():
    np.empty(2**31 + 2**27, np.uint8)[::4096] = 1

taken = keep_freed_memory()
step = jax.jit(lambda x: jnp.square(x @ jnp.ones((2, 16))).sum(1))  # with a temporary array of 64 MiB
x = jnp.ones((2**20, 2))
print(taken)
print(faults_of_the_last(lambda: step(x).block_until_ready(), 8))
print(faults_of_the_last(touch_more_than_an_integer_counts, 2))
"""


@pytest.mark.slow
def test_freed_memory_is_used_again() -> None:
    """In a process of its own, because the settings stay."""
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device
    run = subprocess.run(
        [sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, env=environment
    )
    taken, faults_of_a_step, faults_of_two_gigabytes = run.stdout.split()
    if taken == "False":
        pytest.skip("the C library is not glibc")
    assert int(faults_of_a_step) < 100  # of 16,384 pages
    assert int(faults_of_two_gigabytes) < 100  # of 557,056 pages, or 1,088 huge ones


def test_other_libraries_keep_their_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize(("platforms", "alone"), [("cpu", True), ("cuda,cpu", False), ("tpu", False)])
def test_accelerators_keep_their_allocator(
    monkeypatch: pytest.MonkeyPatch, platforms: str, alone: bool
) -> None:
    monkeypatch.setattr(allocator.jax, "config", SimpleNamespace(jax_platforms=platforms))
    assert allocator._only_cpus() == alone
