"""Live oracles: Hugging Face's ViT, DeiT and Swin, with random weights, in float64."""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from bvit_jax import models, weights
from bvit_jax.inference.images import model_input
from bvit_jax.weights.formats import FORMATS, huggingface
from bvit_jax.weights.state_dicts import to_state_dict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLASSES = 5
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
PATCHES = {"image_size": 16, "patch_size": 4}
SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "image_size": 32, "patch_size": 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", SIZES | PATCHES),
    "deit": ("DeiTConfig", "DeiTForImageClassification", SIZES | PATCHES | {"layer_norm_eps": 1e-6}),
    "deit with teacher": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", SIZES | PATCHES),
    "swin": ("SwinConfig", "SwinForImageClassification", SWIN | {"window_size": 4}),
    "swin of one window": ("SwinConfig", "SwinForImageClassification", SWIN | {"window_size": 8}),
}


@pytest.fixture(scope="module", params=CASES)
def oracle(request, tmp_path_factory):
    """A small model of transformers with random weights, and the directory it saved itself in."""
    config_name, model_name, settings = CASES[request.param]
    config = getattr(transformers, config_name)(
        **settings,
        num_labels=CLASSES,
        hidden_act="gelu",
        attn_implementation="sdpa",  # "eager" takes its softmax in float32
    )
    model = getattr(transformers, model_name)(config).eval()
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        values = 0.3 * rng.standard_normal(tuple(parameter.shape))
        parameter.data = parameter.data.new_tensor(values.astype(np.float32))
    directory = tmp_path_factory.mktemp("transformers") / "model"
    model.save_pretrained(directory)
    return model.double(), directory


def saved_gradients(model, directory):
    """Returns gradients by the names of files, which transformers 5 does not use in memory."""
    holder = copy.deepcopy(model)
    for parameter, original in zip(holder.parameters(), model.parameters(), strict=True):
        parameter.data = original.grad
    holder.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def assert_close(actual, expected, floor=0.0, name=""):
    expected = np.asarray(expected)
    atol = 1e-10 * max(np.abs(expected).max(), floor)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_logits_and_gradients_are_equal(x64, oracle, tmp_path):
    theirs, directory = oracle
    loaded = weights.load(directory)
    assert loaded.config.num_classes == CLASSES
    assert loaded.config.norm_epsilon == theirs.config.layer_norm_eps
    model = models.create_model(loaded.config, jnp.float64)
    size = loaded.config.image_size
    rng = np.random.default_rng(1)
    images, factors = rng.standard_normal((3, size, size, 3)), rng.standard_normal((3, CLASSES))

    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).requires_grad_()
    theirs.zero_grad()
    logits = theirs(pixel_values=pixels).logits
    (logits * torch.from_numpy(factors)).sum().backward()

    @jax.jit
    def run(params, images):
        def loss(params, images):
            logits = model.apply({"params": params}, images).logits
            return jnp.sum(logits * factors), logits

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, images)

    (_, ours), (to_params, to_images) = run(loaded.arrays(np.float64)["params"], images)
    assert_close(ours, logits.detach())
    assert_close(np.moveaxis(to_images, -1, 1), pixels.grad)
    gradients = to_state_dict({"params": to_params}, FORMATS["huggingface"].naming(loaded.config))
    expected = saved_gradients(theirs, tmp_path)
    assert gradients.keys() == expected.keys()
    largest = max(np.abs(g).max() for g in expected.values())
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, 1e-4 * largest, name)  # a key's bias has none


def test_both_heads_are_equal(x64, oracle):
    theirs, directory = oracle
    loaded = weights.load(directory)
    if not loaded.config.get("distillation_head"):
        assert not hasattr(theirs, "distillation_classifier")
        return
    model = models.create_model(loaded.config, jnp.float64)
    images = np.random.default_rng(2).standard_normal((2, 16, 16, 3))
    with torch.no_grad():
        output = theirs(pixel_values=torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
    ours = model.apply(loaded.arrays(np.float64), images)
    for actual, expected in zip(
        ours.head_logits, (output.cls_logits, output.distillation_logits), strict=True
    ):
        assert_close(actual, expected)


def test_transformers_reads_what_we_write(oracle, tmp_path):
    theirs, directory = oracle
    loaded = weights.load(directory)
    names = tuple(f"kind {i}" for i in range(CLASSES))
    weights.save(dataclasses.replace(loaded, class_names=names), tmp_path / "x", "huggingface")
    again, info = type(theirs).from_pretrained(
        tmp_path / "x", attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info.values()), info
    assert again.config.id2label[4] == "kind 4"
    size = loaded.config.image_size
    pixels = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 3, size, size)))
    with torch.no_grad():
        a = theirs(pixel_values=pixels).logits
        b = again.double().eval()(pixel_values=pixels).logits
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.filterwarnings("ignore")  # about torchvision, which is not needed
def test_images_are_prepared_as_transformers_does(tmp_path, square, interpolation):
    processing = weights.Preprocessing(20, 16, interpolation, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), square=square)
    values = huggingface.describe_processor(processing)
    kind = getattr(transformers, values.pop("image_processor_type"))
    # The margin next to the crop is even: transformers rounds half of an odd one down, torchvision and we
    # to the even number.
    pixels = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    theirs = kind(**values)(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    ours = (model_input(tmp_path / "x.png", processing) / 255 - processing.mean) / processing.std
    np.testing.assert_allclose(np.moveaxis(theirs, 0, -1), ours, rtol=0, atol=1e-5)
