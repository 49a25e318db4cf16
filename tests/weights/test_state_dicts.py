"""Our variables as PyTorch state dicts: names, layouts, and what does not fit."""

import jax
import numpy as np
import pytest

from bvit_jax import parity
from bvit_jax.weights import naming as names
from bvit_jax.weights.state_dicts import StateDictError, from_state_dict, to_state_dict
from tests.tiny_models import TINY, abstract_of, assert_same_trees, random_variables, tiny_config

NAMINGS = {
    "deit": (names.REFERENCE, names.HUGGING_FACE_VIT, names.TIMM_DEIT),
    "deit_token": (names.HUGGING_FACE_DEIT,),
    "deit_heads": (names.HUGGING_FACE_DEIT_HEADS, names.TIMM_DEIT),
    "swin": (names.HUGGING_FACE_SWIN, names.TIMM_SWIN, names.MICROSOFT_SWIN),
}
CASES = [(name, naming) for name in TINY for naming in NAMINGS.get(name, (names.REFERENCE,))]


@pytest.fixture
def abstract():
    return abstract_of(tiny_config("deit"))


@pytest.mark.parametrize(("name", "naming"), CASES, ids=[name for name, _ in CASES])
def test_round_trip(name, naming):
    variables = random_variables(abstract_of(tiny_config(name)))
    state = to_state_dict(variables, naming)
    assert sum(a.size for a in state.values()) == sum(a.size for a in jax.tree.leaves(variables))
    assert_same_trees(from_state_dict(state, abstract_of(tiny_config(name)), naming=naming), variables)


def test_dtype_of_the_result(abstract):
    state = to_state_dict(random_variables(abstract, dtype=np.float16))
    for dtype, expected in ((np.float64, np.float64), (None, np.float16)):
        for leaf in jax.tree.leaves(from_state_dict(state, abstract, dtype)):
            assert leaf.dtype == expected
            assert leaf.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("name", ["deit", "react_deit", "react_deit_steps", "binaryvit"])
def test_names_and_shapes_equal_the_files(golden_file, name):
    golden = parity.GoldenFile(golden_file(name))
    abstract = abstract_of(parity.config_of(golden.meta))
    state = to_state_dict(jax.tree.map(lambda a: np.broadcast_to(0.0, a.shape), abstract))
    expected = {
        name: array.shape
        for name, array in golden.group("state").items()
        if not names.REFERENCE.is_bookkeeping(name)
    }
    assert {name: array.shape for name, array in state.items()} == expected


def test_layouts():
    variables = random_variables(abstract_of(tiny_config("binaryvit")))
    state, params = to_state_dict(variables), variables["params"]
    conv = params["downsample1"]["conv"]
    np.testing.assert_array_equal(
        state["vit.encoder.layer.0.intermediate.dense.weight"],
        params["block0"]["mlp"]["expand"]["dense"]["kernel"].T,
    )
    kernel = state["vit.encoder.patch_embed1.proj.weight"]
    assert kernel.shape == (8, 4, 2, 2)
    assert kernel[5, 3, 0, 1] == conv["kernel"][0, 1, 3, 5]
    move = state["vit.encoder.patch_embed1.move"]
    assert move.shape == (1, 4, 1, 1)
    np.testing.assert_array_equal(move.ravel(), conv["move"].ravel())


def test_query_key_and_value_are_stacked_in_this_order():
    variables = random_variables(abstract_of(tiny_config("swin")))
    block = variables["params"]["stage1_block0"]
    state = to_state_dict(variables, names.TIMM_SWIN)
    parts = [block[name]["kernel"].T for name in ("query", "key", "value")]
    np.testing.assert_array_equal(state["layers.1.blocks.0.attn.qkv.weight"], np.concatenate(parts))


def test_downsampling_belongs_to_one_stage_or_the_next():
    variables = random_variables(abstract_of(tiny_config("swin")))
    for naming, name in (
        (names.TIMM_SWIN, "layers.1.downsample.norm.weight"),
        (names.MICROSOFT_SWIN, "layers.0.downsample.norm.weight"),
        (names.HUGGING_FACE_SWIN, "swin.encoder.layers.0.downsample.norm.weight"),
    ):
        assert name in to_state_dict(variables, naming)


def test_bookkeeping_is_left_out(abstract):
    variables = random_variables(abstract)
    state = to_state_dict(variables)
    for name in names.REFERENCE.bookkeeping:
        state[f"vit.layernorm.{name}"] = np.array([1, 2])
    assert_same_trees(from_state_dict(state, abstract), variables)


KEY = "vit.encoder.layer.1.attention.attention.key.weight"


def test_arrays_that_do_not_fit_are_named(abstract):
    state = to_state_dict(random_variables(abstract))
    without = {name: a for name, a in state.items() if name != KEY}
    with pytest.raises(StateDictError, match=rf"1 missing \({KEY}\)$"):
        from_state_dict(without, abstract)

    misspelt = without | {KEY.replace("key", "keys"): state[KEY]}
    with pytest.raises(StateDictError) as caught:
        from_state_dict(misspelt, abstract)
    assert caught.value.problems == [
        f"missing: {KEY}, nearest {KEY.replace('key', 'keys')}",
        f"unexpected: {KEY.replace('key', 'keys')}, nearest {KEY}",
    ]

    with pytest.raises(StateDictError, match=r"1 unexpected \(vit.pooler.weight\)$"):
        from_state_dict(state | {"vit.pooler.weight": np.zeros(3)}, abstract)


@pytest.mark.parametrize("shape", [(8, 9), (8,), (8, 8, 1), ()])
def test_arrays_of_another_shape_are_named(abstract, shape):
    state = to_state_dict(random_variables(abstract))
    with pytest.raises(StateDictError) as caught:
        from_state_dict(state | {KEY: np.zeros(shape)}, abstract)
    assert caught.value.problems == [f"other shape: {KEY} is {shape}, expected (8, 8)"]


def test_arrays_that_hold_no_fractions_are_named(abstract):
    state = to_state_dict(random_variables(abstract))
    with pytest.raises(StateDictError, match=r"holds int64, expected floating-point"):
        from_state_dict(state | {KEY: np.zeros((8, 8), np.int64)}, abstract)


def test_a_stacked_array_that_is_too_short_is_named_as_in_the_file(abstract):
    state = to_state_dict(random_variables(abstract), names.TIMM_DEIT)
    state["blocks.0.attn.qkv.bias"] = state["blocks.0.attn.qkv.bias"][:-1]
    with pytest.raises(StateDictError, match=r"blocks.0.attn.qkv.bias is \(23,\), expected \(24,\)"):
        from_state_dict(state, abstract, naming=names.TIMM_DEIT)


def test_all_problems_are_counted_and_the_first_listed(abstract):
    state = to_state_dict(random_variables(abstract))
    few = dict(sorted(state.items())[:2])
    with pytest.raises(StateDictError) as caught:
        from_state_dict(few, abstract)
    missing = len(state) - 2
    assert len(caught.value.problems) == missing
    assert f"{missing} missing (" in str(caught.value)
    assert f"and {missing - 5} more)" in str(caught.value)
    assert "\n" not in str(caught.value)
