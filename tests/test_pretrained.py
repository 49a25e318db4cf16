"""Weights in PyTorch's names: round trips, damaged files, and Hugging Face's ViT as an oracle."""

import copy
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bvit_jax import models, parity
from bvit_jax.errors import UserError
from bvit_jax.pretrained import (
    BUFFERS,
    abstract_variables,
    from_state_dict,
    load_pretrained,
    save_pretrained,
)
from bvit_jax.torch_names import to_state_dict

GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "deit": {"width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 16, "image_size": 32},
    "extra_res": {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 16, "image_size": 32},
    "binaryvit": {
        "width": (4, 8),
        "depth": (1, 1),
        "num_heads": (1, 2),
        "mlp_dim": (8, 16),
        "reduction": (2, 1),
        "image_size": 32,
    },
}


def tiny(name):
    config = models.model_config(name, **TINY[name], num_classes=3)
    return config, abstract_variables(models.create_model(config), config.image_size)


def random_variables(abstract, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), abstract)


def assert_same_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- state dicts -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_state_dict_round_trip(name):
    _, abstract = tiny(name)
    variables = random_variables(abstract)
    state = to_state_dict(variables)
    assert len(state) == len(jax.tree.leaves(variables))  # no two arrays share a name
    assert_same_trees(from_state_dict(state, abstract), variables)


def test_dtype_of_the_result():
    _, abstract = tiny("deit")
    state = to_state_dict(random_variables(abstract))
    for leaf in jax.tree.leaves(from_state_dict(state, abstract, np.float64)):
        assert leaf.dtype == np.float64
        assert leaf.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("name", ["deit", "react_deit", "react_deit_steps", "binaryvit"])
def test_names_and_shapes_equal_the_files(name):
    golden = parity.GoldenFile(GOLDEN / f"{name}.npz")
    config = parity.config_of(golden.meta)
    abstract = abstract_variables(models.create_model(config), config.image_size)
    state = to_state_dict(jax.tree.map(lambda a: np.broadcast_to(0.0, a.shape), abstract))
    expected = {
        name: array.shape
        for name, array in golden.group("state").items()
        if name.rpartition(".")[2] not in BUFFERS
    }
    assert {name: array.shape for name, array in state.items()} == expected


def test_layouts():
    _, abstract = tiny("binaryvit")
    variables = random_variables(abstract)
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


def test_buffers_of_the_pytorch_code_are_ignored():
    _, abstract = tiny("binaryvit")
    variables = random_variables(abstract)
    state = to_state_dict(variables)
    for buffer in BUFFERS:
        state[f"vit.layernorm.{buffer}"] = np.array([1, 2])
    assert_same_trees(from_state_dict(state, abstract), variables)


def test_arrays_that_do_not_fit_are_named():
    _, abstract = tiny("deit")
    state = to_state_dict(random_variables(abstract))
    name = "vit.encoder.layer.1.attention.attention.key.weight"

    missing = {key: a for key, a in state.items() if key != name}
    with pytest.raises(UserError, match=f"^1 arrays of the model .*'{name}'"):
        from_state_dict(missing, abstract)

    renamed = missing | {name.replace("key", "keys"): state[name]}
    with pytest.raises(UserError, match=f"'{name}'.*did you mean '{name.replace('key', 'keys')}'"):
        from_state_dict(renamed, abstract)

    with pytest.raises(UserError, match=r"^1 arrays of the file .*'vit.pooler.weight'"):
        from_state_dict(state | {"vit.pooler.weight": np.zeros(3)}, abstract)

    with pytest.raises(UserError, match=rf"'{name}' has shape \(8, 9\); .* \(8, 8\)"):
        from_state_dict(state | {name: np.zeros((8, 9))}, abstract)


@pytest.mark.parametrize("shape", [(8,), (8, 8, 1), ()])
def test_arrays_of_another_rank_are_named(shape):
    _, abstract = tiny("deit")
    state = to_state_dict(random_variables(abstract))
    name = "vit.encoder.layer.1.attention.attention.key.weight"
    with pytest.raises(UserError, match=f"'{name}' has shape"):
        from_state_dict(state | {name: np.zeros(shape)}, abstract)


# --- Hugging Face directories ------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    """A saved model; its variables are those of `random_variables`."""
    config, abstract = tiny("deit")
    save_pretrained(tmp_path / "a" / "b", config, random_variables(abstract), ["x", "y", "z"])
    return tmp_path / "a" / "b"


def test_pretrained_round_trip(directory):
    config, abstract = tiny("deit")
    loaded, variables = load_pretrained(directory)
    assert loaded == config
    assert_same_trees(variables, random_variables(abstract))
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    values = json.loads((directory / "config.json").read_text())
    assert values["id2label"] == {"0": "x", "1": "y", "2": "z"}


def test_saving_again_replaces_the_files(directory):
    config, abstract = tiny("deit")
    other = random_variables(abstract, seed=1)
    save_pretrained(directory, config, other, ["x", "y", "z"])
    assert_same_trees(load_pretrained(directory)[1], other)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(directory, name):
    (directory / name).unlink()
    with pytest.raises(UserError, match=f"no {name} in"):
        load_pretrained(directory)


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match=r"no config.json in"):
        load_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, -1])
def test_truncated_weights(directory, kept):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"vit"',
        "{}",
        '{"model_type": "bert"}',
        '{"model_type": "vit"}',
        "\x00",
    ],
)
def test_config_of_something_else(directory, text):
    (directory / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json is not the config.json of a ViT"):
        load_pretrained(directory)


def test_config_that_is_not_text(directory):
    (directory / "config.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match=r"config.json"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("qkv_bias", False),
        ("num_channels", 1),
        ("id2label", 3),
        ("hidden_size", 9),
        ("image_size", 33),
        ("num_hidden_layers", 0),
    ],
)
def test_config_that_is_not_supported(directory, key, value):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError):
        load_pretrained(directory)


def test_weights_of_another_model_name_the_file(directory):
    path = directory / "model.safetensors"
    state = load_file(path)
    state["classifier.bias"] = np.zeros(4, np.float32)
    save_file(state, path)
    with pytest.raises(UserError, match=r"model.safetensors: 'classifier.bias' has shape \(4,\)"):
        load_pretrained(directory)


# --- against transformers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A small ViT of transformers with random weights, and the directory it saved itself in."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
        num_labels=5,
        hidden_act="gelu",
        attn_implementation="sdpa",  # "eager" takes its softmax in float32
    )
    model = transformers.ViTForImageClassification(config).double().eval()
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        values = 0.3 * rng.standard_normal(tuple(parameter.shape))
        parameter.data = parameter.data.new_tensor(values.astype(np.float32))
    directory = tmp_path_factory.mktemp("hugging_face")
    model.float().save_pretrained(directory)
    return model.double(), directory


def test_logits_and_gradients_equal_transformers(x64, hugging_face, tmp_path):
    import torch

    theirs, directory = hugging_face
    config, variables = load_pretrained(directory)
    assert (config.norm_epsilon, config.num_classes) == (1e-12, 5)
    model = models.create_model(config, jnp.float64)
    params = jax.tree.map(lambda a: a.astype(np.float64), variables["params"])
    rng = np.random.default_rng(1)
    images, weights = rng.standard_normal((3, 16, 16, 3)), rng.standard_normal((3, 5))

    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).requires_grad_()
    logits = theirs(pixel_values=pixels).logits
    (logits * torch.from_numpy(weights)).sum().backward()

    @jax.jit
    def run(params, images):
        def loss(params, images):
            logits = model.apply({"params": params}, images).logits
            return jnp.sum(logits * weights), logits

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, images)

    (_, ours), (to_params, to_images) = run(params, images)
    scale = logits.detach().abs().max().item()
    np.testing.assert_allclose(ours, logits.detach(), rtol=0, atol=1e-10 * scale)
    np.testing.assert_allclose(
        np.moveaxis(to_images, -1, 1), pixels.grad, rtol=0, atol=1e-10 * pixels.grad.abs().max()
    )
    gradients = to_state_dict({"params": to_params})
    expected = saved_gradients(theirs, tmp_path)
    assert gradients.keys() == expected.keys()
    largest = max(np.abs(g).max() for g in expected.values())
    for name, gradient in expected.items():
        atol = 1e-10 * max(np.abs(gradient).max(), 1e-4 * largest)  # a key's bias has none
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=atol, err_msg=name)


def saved_gradients(model, directory):
    """Returns gradients by the names of files, which transformers 5 does not use in memory."""
    holder = copy.deepcopy(model)
    for parameter, original in zip(holder.parameters(), model.parameters()):
        parameter.data = original.grad
    holder.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def test_transformers_reads_what_we_write(hugging_face, tmp_path):
    import torch
    import transformers

    theirs, directory = hugging_face
    config, variables = load_pretrained(directory)
    save_pretrained(tmp_path, config, variables, [f"class {i}" for i in range(5)])
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert again.config.id2label[4] == "class 4"
    pixels = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 3, 16, 16)))
    with torch.no_grad():
        a = theirs(pixel_values=pixels).logits
        b = again.double().eval()(pixel_values=pixels).logits
    np.testing.assert_array_equal(a, b)
