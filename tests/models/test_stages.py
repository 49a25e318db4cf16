"""Rematerialised and scanned blocks compute what plain ones do, with the same variables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bvit_jax.config import SETTINGS
from bvit_jax.errors import UserError
from bvit_jax.layers.activation import drop_path_rates
from bvit_jax.models.bhvit import BHViTBlock
from bvit_jax.models.blocks import BinaryBlock
from bvit_jax.models.execution.stages import POLICIES, Execution
from bvit_jax.models.transformer import TransformerBlock, TransformerConfig
from bvit_jax.weights.state_dicts import abstract_variables
from tests.tiny_models import SMALLEST, images_for, smallest, spread_variables

OWN = {  # several equal blocks in a stage
    "deit": {"depth": 3},
    "react_deit": {"depth": 2, "mlp_dim": 8, "image_size": 8},
    "binaryvit": {
        "width": (4,),
        "depth": (2,),
        "num_heads": (1,),
        "mlp_dim": (4,),
        "reduction": (2,),
        "image_size": 8,
        "patch_size": 4,
    },
}
# Two blocks of each kind, and the level quantiser in one window.
OWN["bhvit"] = {
    "depth": (2, 1, 1, 2),
    "width": 4,
    "mlp_dim": (4, 8, 16, 32),
    "num_heads": (1, 1),
    "shift_branches": (),
}
OWN |= dict.fromkeys(("bivit_deit", "bivit_release_deit"), OWN["deit"])
SCAN, BLOCK, DOTS, PRODUCTS = {"scan_blocks": True}, *({"remat": r} for r in ("block", "dots", "products"))
ONE_PASS = {"one_pass_norms": True}
EVERYTHING = SCAN | PRODUCTS | ONE_PASS | {"packed": True}


def tiny(name, dtype=jnp.float32, execution=None, **settings):
    return smallest(name, dtype, Execution(**(execution or {})), **{**OWN.get(name, {}), **settings})


def training_step(name, execution, dtype=jnp.float64, key=None, **settings):
    """Returns the output with what lies inside it, the new statistics and the gradients."""
    model, config = tiny(name, dtype, execution, **settings)
    variables = spread_variables(model, config, np.dtype(dtype))
    images = images_for(config, dtype=np.dtype(dtype))
    rngs = {} if key is None else {"dropout": key}

    @jax.jit
    def run(params):
        def loss(params):
            output, updates = model.apply(
                variables | {"params": params},
                images,
                train=True,
                capture=True,
                mutable=["batch_stats"],
                rngs=rngs,
            )
            return jnp.mean(jnp.square(output.logits)), (output, updates)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return run(variables["params"])


@functools.cache
def plain_step(name):
    return training_step(name, {})


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(1, 32), (2, 1)])
def test_products_of_any_bits_are_kept(weight_bits, act_bits):
    settings = {"weight_bits": weight_bits, "act_bits": act_bits, "mlp_dim": 24, "batch_norm_group": 2}
    steps = [training_step("react_deit", e, **settings) for e in ({}, PRODUCTS)]
    assert_close(*steps)


def assert_close(actual, expected, atol=1e-12, rtol=1e-10):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "execution"),
    [
        ("deit", DOTS),
        ("deit", SCAN | BLOCK),
        ("binaryvit", SCAN),
        ("binaryvit", PRODUCTS),
        ("react_deit", SCAN | PRODUCTS),
        ("swin", SCAN | BLOCK),
        ("bivit_deit", SCAN | BLOCK),
        ("bivit_release_deit", SCAN | DOTS),
        ("bivit_release_swin", SCAN),
    ],
)
def test_nothing_changes_but_how_it_runs(name, execution):
    """Logits, hidden states, attentions, running statistics and gradients, under the same names."""
    assert_close(training_step(name, execution), plain_step(name))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "execution"),
    [("binaryvit", PRODUCTS | ONE_PASS), ("react_deit", ONE_PASS), ("bhvit", EVERYTHING)],
)
def test_norms_in_one_pass_change_nothing_but_roundings(name, execution):
    # Here the running means are random, and some variances so small that a difference of squares shows.
    assert_close(training_step(name, execution), plain_step(name), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("name", SMALLEST)
def test_variables_and_description_stay_the_same(name):
    plain, config = tiny(name)
    model, same = tiny(name, execution=SCAN | DOTS)
    assert same == config
    assert not {"remat", "scan_blocks", "execution"} & set(config)
    assert abstract_variables(model, config.image_size) == abstract_variables(plain, config.image_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_scanned_blocks_are_traced_once(name):
    def calls(depth, execution):
        several = name == "binaryvit" or name.endswith("swin")
        depths = (depth, 1, 1, 1) if name == "bhvit" else (depth,) if several else depth
        model, config = tiny(name, execution=execution, depth=depths)
        variables = abstract_variables(model, config.image_size)
        called = []

        def note(call, args, kwargs, context):
            if isinstance(context.module, BinaryBlock | BHViTBlock | TransformerBlock):
                called.append(context.method_name == "__call__")
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            jax.eval_shape(model.apply, variables, images_for(config))
        return sum(called)

    others = 3 if name == "bhvit" else 0  # in stages of one
    assert calls(4, SCAN) == calls(6, SCAN) < calls(4, {}) == 4 + others


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_rematerialisation_keeps_the_dropout():
    rates = {"dropout": 0.2, "attention_dropout": 0.2, "drop_path": 0.5, "depth": 2}
    steps = [training_step("deit", e, key=jax.random.key(1), **rates) for e in ({}, BLOCK)]
    assert_close(*steps)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("train", [True, False])
def test_each_scanned_block_has_its_drop_path_and_its_key(train):
    rate, depth = 0.6, 3
    model, config = tiny("deit", jnp.float64, SCAN, drop_path=rate, depth=depth)
    variables = spread_variables(model, config, np.float64)
    images = images_for(config, batch=16, dtype=np.float64)
    rngs = {"dropout": jax.random.key(3)} if train else {}
    output = jax.jit(lambda v: model.apply(v, images, train=train, capture=True, rngs=rngs))(variables)

    class Keys(type(model)):  # the key that a stage draws
        def __call__(self, images):
            return self.make_rng("dropout")

    key = Keys().apply({}, images, rngs=rngs) if train else None
    for i, drop_path in enumerate(drop_path_rates(rate, depth)):
        rates = jnp.float32(drop_path) if train else 0.0
        block = TransformerBlock(2, 16, rates, TransformerConfig(dtype=jnp.float64))
        keys = {"dropout": jax.random.fold_in(key, i)} if train else {}
        own = {"params": variables["params"][f"block{i}"]}
        expected, _ = block.apply(own, output.hidden_states[i], train=train, rngs=keys)
        np.testing.assert_allclose(output.hidden_states[i + 1], expected, rtol=1e-10, atol=1e-12)
        skipped = np.all(output.hidden_states[i + 1] == output.hidden_states[i], axis=(1, 2))
        assert not skipped.any() or train
        assert not skipped.any() or i > 0  # whose rate is 0
    assert skipped.any() == train  # both branches of the last: 0.6² of 16 images


def temporaries(execution):
    settings = {"width": 16, "depth": 8, "num_heads": 1, "mlp_dim": 32, "image_size": 32}
    model, config = tiny("deit", execution=execution, **settings)
    variables = abstract_variables(model, config.image_size)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)

    def loss(params, images):
        return jnp.mean(jnp.square(model.apply({"params": params}, images, train=True).logits))

    compiled = jax.jit(jax.grad(loss)).lower(variables["params"], images).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_rematerialisation_saves_memory():
    # In a scan, because XLA's CPU backend merges what unrolled blocks compute again with the first time.
    assert temporaries(SCAN | BLOCK) < 0.4 * temporaries(SCAN)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit", "react_deit"])
def test_a_block_keeps_what_the_policy_says(name):
    """Of what a plain model would keep for the backward pass, by automatic differentiation's account."""

    def kept(execution):
        settings = {"width": 16, "mlp_dim": 64, "depth": 2}
        model, config = tiny(name, execution=execution, **settings)
        variables = spread_variables(model, config)
        images = images_for(config, batch=16)

        def loss(params):
            updated = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.mean(updated[0].logits)

        _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), variables["params"])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    whole, dots, block = (kept(execution) for execution in ({}, DOTS, BLOCK))
    assert block < dots < whole
    if name == "react_deit":
        assert block < kept(PRODUCTS) < dots


def test_the_policies_are_those_of_the_settings():
    assert SETTINGS["remat"].values.choices == ("auto", "none", *POLICIES)


def test_an_unknown_policy_is_named():
    with pytest.raises(UserError, match=r"config.remat is 'all'; of deit, expected one of none, block, dots"):
        tiny("deit", execution={"remat": "all"})
    with pytest.raises(
        UserError, match=r"config.remat is 'products'; of deit, expected one of none, block, dots$"
    ):
        tiny("deit", execution=PRODUCTS)


def test_a_model_without_batch_norms_has_none_in_one_pass():
    for name, settings in (("deit", {}), ("react_deit", {"norm": "layer_norm"})):
        with pytest.raises(UserError, match=f"config.one_pass_norms is True: {name} has no batch norms"):
            tiny(name, execution=ONE_PASS, **settings)
