"""Models from and to files: round trips of every family, what is recognised, assumed and refused."""

import argparse
import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from bvit_jax import weights
from bvit_jax.errors import UserError
from bvit_jax.weights import FORMATS, Preprocessing, loading, resize, saving
from bvit_jax.weights import tensor_files as files
from bvit_jax.weights.class_names import readable_class_names
from bvit_jax.weights.formats.base import ASSUMED_PREPROCESSING
from tests.tiny_models import TINY, assert_same_states, assert_same_trees, tiny_pretrained

# Settings that a bare file does not determine; for the tiny models the assumption would be wrong.
UNDETERMINED = ("num_heads", "reduction", "weight_bits", "image_size", "norm_epsilon")


@pytest.fixture(autouse=True, scope="module")
def shapes_are_found_once():
    """Finding out the shapes of a model takes most of the time of reading it: does so once per model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "abstract_variables", functools.cache(loading.abstract_variables))
        yield


def formats_of(model):
    """Returns the formats that can hold a model."""
    for name in FORMATS:
        try:
            weights.to_format(model, name)
        except UserError:
            continue
        yield name


CASES = [(name, fmt) for name in TINY for fmt in formats_of(tiny_pretrained(name))]


def overrides_of(model):
    """Returns the settings that a user must give for a bare file of a tiny model."""
    return {key: model.config[key] for key in UNDETERMINED if key in model.config}


def foreign_state(model, file_format, rng):
    """Returns a state dict as PyTorch would have saved it: counters have counted, unused arrays vary."""
    state, _ = weights.to_format(model, file_format)
    naming = FORMATS[file_format].naming(model.config)
    for name in state:
        if naming.is_unused(name):
            state[name] = rng.standard_normal(state[name].shape).astype(np.float32)
        if name.endswith("num_batches_tracked"):
            state[name] = np.array(rng.integers(1, 1000), np.int64)
    return {name: np.array(array, order="C") for name, array in state.items()}


def write_safetensors(path, state):
    path.write_bytes(files.encode_safetensors(state, {"format": "pt"}))
    return path


def read_state(path):
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix == ".pth":
        return files.read_torch(path)["model"]
    return files.read_safetensors(path)[0]


def test_every_family_has_a_format():
    assert {name for name, _ in CASES} == set(TINY)
    assert {fmt for _, fmt in CASES} == set(FORMATS)


# --- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["directory", "x.safetensors", "x.pth"])
@pytest.mark.parametrize(("name", "file_format"), CASES)
def test_from_torch_and_back_is_bit_identical(tmp_path, name, file_format, target):
    if target.endswith(".pth"):
        pytest.importorskip("torch")
    model = tiny_pretrained(name)
    state = foreign_state(model, file_format, np.random.default_rng(0))
    if file_format == "huggingface":
        source = tmp_path / "source"
        weights.save(model, source, file_format)
        options = {}
    else:
        source = write_safetensors(tmp_path / "source.safetensors", state)
        options = {"overrides": overrides_of(model)}
    loaded = weights.load(source, **options)
    assert loaded.bookkeeping_format == file_format
    assert loaded.config == model.config
    assert_same_trees(loaded.variables, model.variables)

    weights.save(loaded, tmp_path / "native")
    native = weights.load(tmp_path / "native")
    weights.save(native, tmp_path / target, file_format)
    assert_same_states(read_state(tmp_path / target), state)
    # What is written describes itself: nothing is assumed any more.
    again = weights.load(tmp_path / target)
    assert again.config == model.config
    assert not again.assumed
    assert_same_trees(again.variables, model.variables)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_dtypes_are_kept(tmp_path, dtype):
    model = tiny_pretrained("deit_heads", dtype=dtype)
    state = foreign_state(model, "timm", np.random.default_rng(0))
    source = write_safetensors(tmp_path / "source.safetensors", state)
    loaded = weights.load(source, overrides=overrides_of(model))
    weights.save(loaded, tmp_path / "native")
    weights.save(weights.load(tmp_path / "native"), tmp_path / "back.safetensors", "timm")
    assert_same_states(read_state(tmp_path / "back.safetensors"), state)
    assert {a.dtype for a in jax.tree.leaves(loaded.arrays())} == {np.dtype(np.float32)}


def test_what_is_known_travels_with_the_model(tmp_path):
    model = tiny_pretrained("deit_1e-5", drop_path=0.25)
    preprocessing = Preprocessing(40, 32, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model = dataclasses.replace(model, preprocessing=preprocessing, class_names=("a", "b", "c"))
    path = tmp_path / "0"
    weights.save(model, path)
    for i, name in enumerate(("huggingface", "reference", "native"), 1):
        loaded = weights.load(path)
        assert (loaded.config, loaded.preprocessing) == (model.config, preprocessing)
        assert loaded.class_names == ("a", "b", "c")
        path = tmp_path / str(i)
        weights.save(loaded, path, name)
    history = weights.load(path).history
    assert [entry["format"] for entry in history] == ["huggingface", "reference"]
    assert history[0]["sha256"] == files.sha256(tmp_path / "1" / "model.safetensors")


def test_a_native_directory_is_what_the_documentation_says(tmp_path):
    weights.save(tiny_pretrained("binaryvit"), tmp_path / "native")
    assert {path.name for path in (tmp_path / "native").iterdir()} == {"config.json", "model.safetensors"}
    values = json.loads((tmp_path / "native" / "config.json").read_text())
    assert values["format"] == "bvit_jax"
    assert values["model"]["norm_epsilon"] == 1e-5
    assert values["preprocessing"]["resize"] == 36
    assert values["class_names"] == ["name 0", "name 1", "name 2"]
    state, _ = files.read_safetensors(tmp_path / "native" / "model.safetensors")
    assert state["params/block0/attention/query/dense/kernel"].shape == (4, 4)


def edit_json(path: Path, **entries) -> None:
    values = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def foreign_directory(tmp_path, file_format="huggingface", model=None, processor=None, **entries):
    """Writes a model as others would have, without our description, and returns the directory."""
    path = tmp_path / "x"
    weights.save(model or tiny_pretrained("deit"), path, file_format)
    edit_json(path / "config.json", bvit_jax=None, **entries)
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


# --- what files do not say ---------------------------------------------------------------------


def bare(tmp_path, name, file_format, **settings):
    model = tiny_pretrained(name, **settings)
    state = foreign_state(model, file_format, np.random.default_rng(0))
    return write_safetensors(tmp_path / f"{name}.safetensors", state)


def test_the_size_of_a_swin_without_masks_is_that_of_whole_windows(tmp_path):
    for size, window in ((32, 4), (96, 12)):
        path = bare(tmp_path, "swin", "timm", image_size=size, window_size=window)
        loaded = weights.load(path)
        patch, stages = loaded.config.patch_size, len(loaded.config.depth)
        expected = patch * window * 2 ** (stages - 1)
        assert loaded.config.image_size == expected
        assert f"image_size {expected}" in loaded.assumed


@pytest.mark.parametrize(
    ("name", "file_format"),
    [
        ("deit", "timm"),
        ("deit_heads", "timm"),
        ("swin", "microsoft"),
        ("swin", "timm"),
        ("deit", "huggingface"),
    ],
)
def test_a_backbone_without_a_classifier_gets_one(tmp_path, name, file_format):
    model = tiny_pretrained(name)
    weights.save(model, tmp_path / "whole", file_format)
    state, _ = files.read_safetensors(tmp_path / "whole" / "model.safetensors")
    backbone = {n: a for n, a in state.items() if not n.startswith(("head", "classifier", "cls_classifier"))}
    if file_format == "huggingface":  # as ViTModel saves it
        backbone = {n.partition(".")[2]: a for n, a in backbone.items()}
        backbone["pooler.dense.bias"] = np.ones(3, np.float32)
    (tmp_path / "whole" / "model.safetensors").write_bytes(files.encode_safetensors(backbone, {}))
    edit_json(tmp_path / "whole" / "config.json", bvit_jax=None)
    options = {"overrides": overrides_of(model)}
    with pytest.raises(UserError):
        weights.load(tmp_path / "whole", **options)
    loaded = weights.load(tmp_path / "whole", new_classes=5, **options)
    assert loaded.config.num_classes == 5
    assert loaded.left_out == (("pooler.dense.bias",) if file_format == "huggingface" else ())
    heads = {"head", "distillation_head"}
    for part in model.variables["params"].keys() - heads:
        assert_same_trees(loaded.variables["params"][part], model.variables["params"][part])


def test_heads_of_64_channels_are_assumed(tmp_path):
    path = bare(tmp_path, "deit", "timm", width=128)
    loaded = weights.load(path)
    assert loaded.config.num_heads == 2
    assert loaded.config.norm_epsilon == 1e-6
    assert loaded.assumed == ("num_heads 2 (64 channels each)", "norm_epsilon 1e-06", ASSUMED_PREPROCESSING)
    assert weights.load(path, overrides={"num_heads": 4}).config.num_heads == 4
    assumed = weights.load(path, overrides={"num_heads": 4}).assumed
    assert assumed == ("norm_epsilon 1e-06", ASSUMED_PREPROCESSING)


def test_sizes_and_switches_of_the_reference_come_from_the_arrays(tmp_path):
    path = bare(tmp_path, "binaryvit_w1a32", "reference")
    loaded = weights.load(path)
    config = loaded.config
    assert (config.width, config.depth, config.mlp_dim) == ((4, 8), (1, 2), (8, 16))
    assert (config.act_bits, config.image_size, config.patch_size) == (32, 32, 4)
    assert [text.split()[0] for text in loaded.assumed] == ["reduction", "weight_bits", "num_heads"]


def test_the_clipping_of_the_reference_comes_from_its_constants(tmp_path):
    path = bare(tmp_path, "binaryvit_w4", "reference")
    loaded = weights.load(path, overrides={"weight_bits": 4})
    assert loaded.config.clip_val == 1.5


def test_the_reference_s_config_json_is_a_configuration(tmp_path):
    model = tiny_pretrained("binaryvit")
    path = bare(tmp_path, "binaryvit", "reference")
    values = {
        "hidden_size": [4, 8],
        "depths": [1, 2],
        "num_attention_heads": [1, 2],
        "intermediate_size": [8, 16],
        "reduction_ratio": [2, 1],
        "image_size": 32,
        "patch_size": 4,
        "layer_norm_eps": 1e-12,  # the code overrides it
        "id2label": {"0": "x", "1": "y", "2": "z"},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = weights.load(path, config_file=tmp_path / "config.json")
    assert loaded.config == model.config
    assert loaded.class_names == ("x", "y", "z")
    assert loaded.assumed == ("weight_bits 1",)


@pytest.mark.slow
def test_stages_of_one_width_need_the_config_json(tmp_path):
    model = tiny_pretrained("binaryvit", width=(8, 8), mlp_dim=(16, 16), reduction=(1, 1), num_heads=(1, 1))
    state = foreign_state(model, "reference", np.random.default_rng(0))
    path = write_safetensors(tmp_path / "x.safetensors", state)
    with pytest.raises(UserError, match="arrays that do not fit the model"):
        weights.load(path)
    (tmp_path / "config.json").write_text(
        json.dumps({"hidden_size": [8, 8], "depths": [1, 2], "intermediate_size": [16, 16]}).replace(
            "}", ', "num_attention_heads": [1, 1], "reduction_ratio": [1, 1]}'
        )
    )
    loaded = weights.load(path, config_file=tmp_path / "config.json")
    assert loaded.config == model.config


@pytest.mark.slow
@pytest.mark.parametrize("some_fp", [False, True])
def test_bhvit_of_several_bits_has_a_clipping_for_every_quantised_weight(tmp_path, some_fp):
    """Those of the grouped convolutions among them; a real patch embedding has none."""
    model = tiny_pretrained("bhvit", weight_bits=4, clip_val=1.5, some_fp=some_fp)
    state = foreign_state(model, "bhvit", np.random.default_rng(0))
    clipped = {name.removesuffix("_clip_val") for name in state if name.endswith(".weight_clip_val")}
    kinds = r"\.(cov\d|query|key|value|dense|patch_embed\d\.proj)\.weight$"
    quantised = {name for name in state if re.search(kinds, name) and not (some_fp and "proj" in name)}
    assert clipped == quantised
    assert len(clipped) == 2 * (3 + 2) + 2 * (4 + 2) + 3 * (not some_fp)
    path = write_safetensors(tmp_path / "x.safetensors", state)
    loaded = weights.load(path, overrides=overrides_of(model))
    assert loaded.config == model.config
    assert_same_trees(loaded.variables, model.variables)
    with pytest.raises(UserError, match="weight_bits is 1"):
        weights.load(path, overrides=overrides_of(model) | {"weight_bits": 1})


@pytest.mark.slow
def test_a_training_checkpoint_of_the_reference(tmp_path):
    torch = pytest.importorskip("torch")
    model = tiny_pretrained("binaryvit_w4")
    state = foreign_state(model, "reference", np.random.default_rng(0))
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    args = argparse.Namespace(
        model_type="extra-res-pyramid", weight_bits=4, input_bits=1, drop_path=0.1, opt_betas=None
    )
    other = tensors | {"classifier.bias": tensors["classifier.bias"] + 1}
    content = {"model": tensors, "optimizer": {"state": {}}, "epoch": 3, "scaler": {}, "args": args}
    torch.save(content | {"model_ema": other}, tmp_path / "checkpoint.pth")
    options = {"overrides": {"num_heads": (1, 2), "reduction": (2, 1)}}
    loaded = weights.load(tmp_path / "checkpoint.pth", **options)
    assert (loaded.config.weight_bits, loaded.config.drop_path) == (4, 0.1)
    assert loaded.left_out == ("args", "epoch", "model_ema", "optimizer", "scaler")
    assert_same_trees(loaded.variables, model.variables)

    averaged = weights.load(tmp_path / "checkpoint.pth", weights_key="model_ema", **options)
    assert "model" in averaged.left_out
    np.testing.assert_array_equal(
        averaged.variables["params"]["head"]["bias"], model.variables["params"]["head"]["bias"] + 1
    )
    with pytest.raises(UserError, match=r"no entry 'model_em'; did you mean 'model_ema'"):
        weights.load(tmp_path / "checkpoint.pth", weights_key="model_em")
    with pytest.raises(UserError, match="holds no state dict under 'epoch'"):
        weights.load(tmp_path / "checkpoint.pth", weights_key="epoch")


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "model._orig_mod.",
        "_forward_module.net.",
        "student.",
    ],
)
def test_prefixes_that_wrappers_add_are_taken_off_in_any_order(tmp_path, prefix):
    model = tiny_pretrained("deit_heads")
    state = foreign_state(model, "timm", np.random.default_rng(0))
    wrapped = {f"{prefix}{name}": array for name, array in state.items()}
    path = write_safetensors(tmp_path / "x.safetensors", wrapped)
    assert_same_trees(weights.load(path, overrides=overrides_of(model)).variables, model.variables)
    more = wrapped | {"criterion.weight": np.ones(3, np.float32), f"{prefix}extra": np.ones(3, np.float32)}
    path = write_safetensors(tmp_path / "more.safetensors", more)
    loaded = weights.load(path, overrides=overrides_of(model), ignored=["criterion.*", "extra"])
    assert loaded.left_out == ("criterion.weight", "extra")
    assert_same_trees(loaded.variables, model.variables)


def test_checkpoints_of_other_training_loops(tmp_path):
    torch = pytest.importorskip("torch")
    model = tiny_pretrained("deit_heads")
    state = foreign_state(model, "timm", np.random.default_rng(0))
    tensors = {f"model.{name}": torch.from_numpy(array) for name, array in state.items()}
    options = {"overrides": overrides_of(model)}
    torch.save({"state_dict": tensors, "pytorch-lightning_version": "2.5"}, tmp_path / "last.ckpt")
    assert_same_trees(weights.load(tmp_path / "last.ckpt", **options).variables, model.variables)

    torch.save({"epoch": 1, "weights": tensors}, tmp_path / "own.pth")
    with pytest.raises(UserError, match=r"no state dict, but epoch, weights; name that of .* with --key"):
        weights.load(tmp_path / "own.pth", **options)
    loaded = weights.load(tmp_path / "own.pth", weights_key="weights", **options)
    assert_same_trees(loaded.variables, model.variables)

    (tmp_path / "state").mkdir()  # Accelerate's save_state
    (tmp_path / "state" / "random_states_0.pkl").write_bytes(b"")
    torch.save(tensors, tmp_path / "state" / "pytorch_model.bin")
    assert_same_trees(weights.load(tmp_path / "state", **options).variables, model.variables)


def test_shards_of_bin(tmp_path):
    torch = pytest.importorskip("torch")
    model = tiny_pretrained("deit")
    directory = tmp_path / "d"
    weights.save(model, directory, "huggingface")
    state, _ = files.read_safetensors(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: torch.from_numpy(state[name]) for name in part}, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in (directory, directory / "pytorch_model-00001-of-00002.bin"):
        assert_same_trees(weights.load(path).variables, model.variables)


def test_a_thousand_classes_without_names_are_imagenet_s(tmp_path):
    loaded = weights.load(bare(tmp_path, "deit", "timm", num_classes=1000))
    assert loaded.class_names[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert loaded.class_names[-1] == "toilet tissue, toilet paper, bathroom tissue"
    assert readable_class_names(["n01443537", "cat"]) == ("goldfish, Carassius auratus", "cat")


def test_sharded_directories_are_read(tmp_path):
    model = tiny_pretrained("swin")
    weights.save(model, tmp_path / "whole", "huggingface")
    state = read_state(tmp_path / "whole")
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        write_safetensors(tmp_path / "whole" / file, {name: state[name] for name in members})
    weight_map = {name: file for file, members in shards.items() for name in members}
    (tmp_path / "whole" / "model.safetensors").unlink()
    (tmp_path / "whole" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = weights.load(tmp_path / "whole")
    assert_same_trees(loaded.variables, model.variables)
    assert [entry["file"] for entry in loaded.history] == ["a.safetensors", "b.safetensors"]


# --- preprocessing -----------------------------------------------------------------------------


@pytest.mark.parametrize("square", [False, True])
def test_preprocessing_through_hugging_face_s_file(tmp_path, square):
    expected = Preprocessing(48, 32, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), square)
    model = dataclasses.replace(tiny_pretrained("deit"), preprocessing=expected)
    assert weights.load(foreign_directory(tmp_path, model=model)).preprocessing == expected


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        # what google/vit-base and facebook/deit-small are published with
        (
            {"size": 32, "resample": 2, "do_resize": True} | HALF,
            Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3, True),
        ),
        (
            {"size": 36, "crop_size": 32, "do_center_crop": True, "resample": 3} | IMAGENET,
            Preprocessing(36, 32, square=True),
        ),
        # what is left out has the default of the kind
        (
            {"image_processor_type": "DeiTImageProcessor", "size": 36, "crop_size": 32},
            Preprocessing(36, 32, "bicubic", (0.5,) * 3, (0.5,) * 3, True),
        ),
        (
            {"feature_extractor_type": "ViTFeatureExtractor", "size": 32},
            Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3, True),
        ),
    ],
)
def test_processors_of_hugging_face(tmp_path, processor, expected):
    assert weights.load(foreign_directory(tmp_path, processor=processor)).preprocessing == expected


def test_without_a_processor_images_are_prepared_as_for_deit(tmp_path):
    path = foreign_directory(tmp_path)
    (path / "preprocessor_config.json").unlink()
    assert weights.load(path).preprocessing == Preprocessing(36, 32)


@pytest.mark.parametrize(
    "change",
    [{"size": 64}, {"resample": 9}, {"do_normalize": False}, {"image_mean": 3}, {"rescale_factor": 1.0}],
)
def test_a_processor_that_is_not_understood(tmp_path, change):
    path = foreign_directory(tmp_path, processor={"size": 32, "resample": 3} | HALF | change)
    with pytest.raises(UserError, match=r"its preprocessor_config.json is not understood"):
        weights.load(path)


def test_timm_s_crop_is_understood(tmp_path):
    expected = Preprocessing(35, 32, "bicubic", (0.5,) * 3, (0.25,) * 3)
    model = dataclasses.replace(tiny_pretrained("swin"), preprocessing=expected)
    loaded = weights.load(foreign_directory(tmp_path, "timm", model))
    assert loaded.preprocessing == expected
    assert loaded.config.image_size == 32


@pytest.mark.parametrize("file_format", ["native", "reference"])
def test_the_former_name_of_a_model_still_loads_and_is_not_written_again(tmp_path, file_format):
    weights.save(tiny_pretrained("react_deit_ls"), tmp_path / "x", file_format)
    description = tmp_path / "x" / "config.json"
    assert "react_deit" in description.read_text()
    description.write_text(description.read_text().replace("react_deit", "extra_res"))
    loaded = weights.load(tmp_path / "x")
    assert loaded.config.name == "react_deit"
    assert loaded.config.pool_branches == (3, 5)  # as the description says
    weights.save(loaded, tmp_path / "y", file_format)
    assert "extra_res" not in (tmp_path / "y" / "config.json").read_text()


# --- other sizes, other classes ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit", "deit_heads", "react_deit", "react_deit_ls", "binaryvit", "swin"])
def test_another_image_size(tmp_path, name):
    model = tiny_pretrained(name)
    resized = resize.resized(model, 64)
    assert (resized.config.image_size, model.config.image_size) == (64, 32)
    assert (resized.preprocessing.crop, resized.preprocessing.resize) == (64, 72)
    weights.save(resized, tmp_path / "x")  # and its shapes are those of the larger model
    assert_same_trees(weights.load(tmp_path / "x").variables, resized.variables)
    if name.startswith("deit"):
        old, new = (m.variables["params"]["embedding"]["positions"] for m in (model, resized))
        extra = 2 if name == "deit_heads" else 1
        np.testing.assert_array_equal(old[:, :extra], new[:, :extra])


def test_masks_are_those_of_the_new_size(tmp_path):
    model = tiny_pretrained("swin")
    state = foreign_state(model, "microsoft", np.random.default_rng(0))
    path = write_safetensors(tmp_path / "x.safetensors", state)
    resized = resize.resized(weights.load(path, overrides=overrides_of(model)), 64)
    weights.save(resized, tmp_path / "y.safetensors", "microsoft")
    again = weights.load(tmp_path / "y.safetensors")
    assert again.config.image_size == 64
    assert again.bookkeeping["layers.0.blocks.1.attn_mask"].shape == (16, 16, 16)


def test_an_image_size_that_does_not_divide():
    with pytest.raises(UserError, match=r"config.model.image_size is 33"):
        resize.resized(tiny_pretrained("deit"), 33)


def test_positions_that_are_a_grid_are_resized_as_tokens_are():
    model = tiny_pretrained("bhvit")
    resized = resize.resized(model, 448)
    for name, side in (("embedding", 56), ("downsample1", 28), ("downsample3", 7)):
        found, own = (m.variables["params"][name]["positions"] for m in (resized, model))
        tokens = own.reshape(1, side * side, -1)
        np.testing.assert_array_equal(
            found.reshape(1, 4 * side * side, -1), resize.resize_positions(tokens, 0, 2 * side)
        )
    assert resized.variables["params"]["embedding"]["positions"].shape == (1, 112, 112, 4)


def test_a_new_head_is_initialised_and_the_rest_kept():
    model = tiny_pretrained("deit_heads")
    changed = resize.with_new_head(model, ("a", "b", "c", "d", "e"))
    assert changed.config.num_classes == 5
    params = changed.variables["params"]
    for name in ("head", "distillation_head"):
        assert params[name]["kernel"].shape == (8, 5)
        assert 0 < np.abs(params[name]["kernel"]).max() <= 8**-0.5
    assert not np.array_equal(params["head"]["kernel"], params["distillation_head"]["kernel"])
    for name in params.keys() - {"head", "distillation_head"}:
        assert_same_trees(params[name], model.variables["params"][name])


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture(params=["native", "huggingface"])
def directory(tmp_path, request):
    weights.save(tiny_pretrained("deit"), tmp_path / "d", request.param)
    return tmp_path / "d"


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no file or directory"):
        weights.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config.json in"):
        weights.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(directory, name):
    (directory / name).unlink()
    with pytest.raises(UserError, match=f"no {name} in"):
        weights.load(directory)


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, -1])
def test_truncated_weights(directory, kept):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors"):
        weights.load(directory)


DEEP = "[" * 200_000


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"vit"', "{}", "\x00", DEEP, b"\xff\xfe\x80"])
def test_config_that_is_no_description(directory, text):
    (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"^cannot read {directory / 'config.json'}: ") as caught:
        weights.load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "relu", "only 'gelu' is supported"),
        ("qkv_bias", False, "only True is supported"),
        ("num_channels", 1, "only 3 is supported"),
        ("hidden_size", 9, "config.model.width is 9"),
        ("hidden_size", "wide", "config.model.width is 'wide'"),
        ("image_size", 33, "33"),
        ("num_hidden_layers", 0, "config.model.depth is 0"),
        ("num_hidden_layers", 3, "arrays that do not fit the model"),
        ("num_hidden_layers", 3_000_000, "config.model.depth is 3000000, and the file has 40 arrays"),
        ("layer_norm_eps", None, "its config.json has no layer_norm_eps"),
        ("model_type", "beit", "model_type is 'beit'; expected vit, deit or swin"),
    ],
)
def test_hugging_face_config_that_is_not_supported(tmp_path, key, value, message):
    weights.save(tiny_pretrained("deit"), tmp_path / "d", "huggingface")
    edit_json(tmp_path / "d" / "config.json", **{key: value})
    with pytest.raises(UserError, match=message) as caught:
        weights.load(tmp_path / "d")
    assert "\n" not in str(caught.value)


def test_swin_of_hugging_face_with_another_epsilon(tmp_path):
    weights.save(tiny_pretrained("swin"), tmp_path / "d", "huggingface")
    edit_json(tmp_path / "d" / "config.json", layer_norm_eps=1e-6)
    with pytest.raises(UserError, match="for some norms of Swin only"):
        weights.load(tmp_path / "d")
    with pytest.raises(UserError, match="transformers' Swin computes with 1e-05"):
        weights.save(tiny_pretrained("swin", norm_epsilon=1e-6), tmp_path / "e", "huggingface")


@pytest.mark.parametrize(
    "entries",
    [
        {"model": None},
        {"model": {"name": "deit", "wide": 3}},
        {"model": {"name": "vit"}},
        {"preprocessing": None},
        {"preprocessing": {"resize": 3}},
        {"class_names": ["only one"]},
        {"class_names": None},
        {"history": None},
        {"bookkeeping": None},
    ],
)
def test_native_config_that_does_not_fit(tmp_path, entries):
    weights.save(tiny_pretrained("deit"), tmp_path / "d")
    edit_json(tmp_path / "d" / "config.json", **entries)
    with pytest.raises(UserError) as caught:
        weights.load(tmp_path / "d")
    assert "\n" not in str(caught.value)


def test_constants_of_a_changed_model_are_found(tmp_path):
    model = tiny_pretrained("swin")
    state = foreign_state(model, "microsoft", np.random.default_rng(0))
    state["layers.0.blocks.1.attn_mask"] = np.array(state["layers.0.blocks.1.attn_mask"] / 2)
    path = write_safetensors(tmp_path / "x.safetensors", state)
    with pytest.raises(UserError, match=r"the constant layers.0.blocks.1.attn_mask differs from the one"):
        weights.load(path, overrides=overrides_of(model))


def test_arrays_of_an_unknown_model(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", {"conv1.weight": np.zeros(3), "fc": np.zeros(2)})
    with pytest.raises(UserError, match=r"its arrays are called conv1.weight, fc\.\.\.; expected"):
        weights.load(path)


def test_an_unknown_kind_of_file(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"x.onnx is of an unknown kind"):
        weights.load(tmp_path / "x.onnx")


@pytest.mark.parametrize(("name", "file_format"), [("deit", "timm"), ("binaryvit", "reference")])
def test_a_damaged_state_names_the_file_and_the_arrays(tmp_path, name, file_format):
    state = foreign_state(tiny_pretrained(name), file_format, np.random.default_rng(0))
    lost = next(n for n in state if n.endswith(("norm1.bias", "layernorm_after.bias")))
    del state[lost]
    path = write_safetensors(tmp_path / "x.safetensors", state)
    with pytest.raises(UserError, match=rf"^{path}: arrays that do not fit the model: 1 missing \({lost}\)$"):
        weights.load(path, overrides=overrides_of(tiny_pretrained(name)))


@pytest.mark.parametrize(
    ("name", "file_format", "message"),
    [
        ("binaryvit", "huggingface", "has no 'binaryvit', only deit, swin; use native or reference"),
        ("deit_heads", "reference", "has no distillation token"),
        ("deit", "reference", "the BinaryViT code computes with 1e-05 whatever its files say"),
        ("deit_token", "timm", "a distillation token only with its head"),
        ("deit", "microsoft", "has no 'deit', only swin"),
        ("deit", "tim", "no format 'tim'; did you mean 'timm'"),
    ],
)
def test_a_format_that_cannot_hold_the_model(tmp_path, name, file_format, message):
    with pytest.raises(UserError, match=message):
        weights.save(tiny_pretrained(name), tmp_path / "x", file_format)
    assert list(tmp_path.iterdir()) == []


# --- targets appear whole or not at all --------------------------------------------------------


@pytest.mark.parametrize("target", ["x", "x.safetensors", "x.pth"])
def test_an_existing_target_is_kept(tmp_path, target):
    (tmp_path / target).write_text("mine")
    with pytest.raises(UserError, match=r"exists; delete it or choose another target"):
        weights.save(tiny_pretrained("deit"), tmp_path / target)
    assert (tmp_path / target).read_text() == "mine"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, content):
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write", fail)
    for target in ("x", "x.safetensors"):
        with pytest.raises(UserError, match=r"cannot write .*x.*: No space left on device"):
            weights.save(tiny_pretrained("deit"), tmp_path / target)
    assert list(tmp_path.iterdir()) == []


def test_a_target_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        weights.save(tiny_pretrained("deit"), tmp_path / "file" / "x")


def test_the_digest_is_that_of_the_weights(tmp_path):
    model = tiny_pretrained("deit")
    for name in ("native", "timm", "huggingface"):
        weights.save(model, tmp_path / name, name)
        assert weights.load(tmp_path / name).digest() == model.digest()
    assert tiny_pretrained("deit", seed=1).digest() != model.digest()


# --- values that nobody would write ------------------------------------------------------------

NONSENSE = (None, 0, -1, 1e308, True, "x", [], {"a": 1}, [[1]])


def places_in(value, path=()):
    """Yields the path of every value in a JSON tree; of long lists and tables, of the first alone."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:14]:
        yield from places_in(item, (*path, key))


def with_value(tree, path, value):
    copy = json.loads(json.dumps(tree))
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return copy


def assert_understood_or_refused(directory):
    """Loads a directory; a problem must be one line that names it."""
    try:
        weights.load(directory)
    except UserError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    assert str(directory) in message


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("file_format", ["native", "huggingface", "timm"])
def test_nonsense_in_a_description_is_one_line(tmp_path, file_format, file):
    weights.save(tiny_pretrained("swin", num_classes=2), tmp_path / "x", file_format)
    path = tmp_path / "x" / file
    if not path.exists():
        assert file_format != "huggingface"
        return
    original = json.loads(path.read_text())
    foreign = {key: value for key, value in original.items() if key != "bvit_jax"}
    trees = {"native": [original], "huggingface": [original, foreign], "timm": [foreign]}[file_format]
    for tree in trees:
        (tmp_path / "x" / "config.json").write_text(
            json.dumps(tree) if file == "config.json" else (tmp_path / "x" / "config.json").read_text()
        )
        for place in places_in(tree):
            for value in NONSENSE:
                path.write_text(json.dumps(with_value(tree, place, value)))
                assert_understood_or_refused(tmp_path / "x")


@pytest.mark.parametrize("name", ["binaryvit_w4", "deit_heads", "swin"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (1, 1, 1), (2, 2, 2, 2, 2)])
def test_arrays_of_any_shape_are_refused_in_one_line(tmp_path, name, shape):
    model = tiny_pretrained(name)
    file_format = "reference" if name.startswith("binary") else "timm"
    state = foreign_state(model, file_format, np.random.default_rng(0))
    for array in sorted(state)[:: len(state) // 12]:
        if state[array].shape == shape or array.endswith("num_batches_tracked"):
            continue
        changed = state | {array: np.zeros(shape, state[array].dtype)}
        path = write_safetensors(tmp_path / "x.safetensors", changed)
        with pytest.raises(UserError) as caught:
            weights.load(path, overrides=overrides_of(model) if name != "binaryvit_w4" else BITS)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


BITS = {"num_heads": (1, 2), "reduction": (2, 1), "weight_bits": 4}


# --- what was found by trying to break it ------------------------------------------------------


def test_weights_inside_a_directory_are_read_with_its_description(tmp_path):
    model = tiny_pretrained("deit", norm_epsilon=1e-12)
    loaded = weights.load(foreign_directory(tmp_path, model=model) / "model.safetensors")
    assert loaded.config == model.config
    assert loaded.bookkeeping_format == "huggingface"


def test_the_old_weights_file_of_hugging_face(tmp_path):
    pytest.importorskip("torch")
    model = tiny_pretrained("deit")
    safetensors = foreign_directory(tmp_path) / "model.safetensors"
    files.write_torch(tmp_path / "x" / "pytorch_model.bin", read_state(safetensors))
    safetensors.unlink()
    assert_same_trees(weights.load(tmp_path / "x").variables, model.variables)


def test_the_reference_s_config_json_does_not_change_the_epsilon(tmp_path):
    torch = pytest.importorskip("torch")
    state = foreign_state(tiny_pretrained("deit_1e-5"), "reference", np.random.default_rng(0))
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    torch.save({"model": tensors, "args": argparse.Namespace(model_type="deit")}, tmp_path / "x.pth")
    weights.save(tiny_pretrained("deit", norm_epsilon=1e-12), tmp_path / "hf", "huggingface")
    edit_json(tmp_path / "hf" / "config.json", bvit_jax=None)
    loaded = weights.load(tmp_path / "x.pth", config_file=tmp_path / "hf" / "config.json")
    assert (loaded.bookkeeping_format, loaded.config.norm_epsilon) == ("reference", 1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "beit_base_patch16_224"}, "has architecture 'beit_base_patch16_224'"),
        ({"architecture": "vit_base_patch16_clip_224"}, "expected a plain DeiT, ViT or Swin"),
        ({"model_args": {"qk_norm": True}}, "has model_args qk_norm"),
        ({"global_pool": "avg"}, "global_pool is 'avg', expected 'token'"),
    ],
)
def test_other_models_of_timm_are_refused(tmp_path, values, message):
    path = foreign_directory(tmp_path, "timm", **values)
    with pytest.raises(UserError, match=message):
        weights.load(path)


def test_timm_s_class_names_and_first_config_files_are_read(tmp_path):
    flat = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    loaded = weights.load(foreign_directory(tmp_path, "timm", pretrained_cfg=None, **flat))
    assert loaded.class_names == ("name 0", "name 1", "name 2")
    assert loaded.preprocessing == Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(("bits", "name"), [(1, "binaryvit_w4"), (4, "binaryvit"), (9, "binaryvit_w4")])
def test_bits_that_are_not_those_of_the_arrays(tmp_path, bits, name):
    path = bare(tmp_path, name, "reference")
    with pytest.raises(UserError, match=f"weight_bits is {bits}"):
        weights.load(path, overrides={"num_heads": (1, 2), "reduction": (2, 1), "weight_bits": bits})


@pytest.mark.parametrize(
    ("name", "file_format", "array"),
    [
        ("swin", "huggingface", "made.up.attn_mask"),
        ("swin", "timm", "layers.0.blocks.0.attn_mask"),  # of a block that is not shifted
        ("binaryvit", "reference", "bogus.num_batches_tracked"),
    ],
)
def test_bookkeeping_of_modules_that_do_not_exist(tmp_path, name, file_format, array):
    model = tiny_pretrained(name)
    if file_format == "huggingface":
        weights.save(model, tmp_path / "x", file_format)
        path = tmp_path / "x"
        write_safetensors(path / "model.safetensors", read_state(path) | {array: np.zeros(1)})
    else:
        state = foreign_state(model, file_format, np.random.default_rng(0))
        path = write_safetensors(tmp_path / "x.safetensors", state | {array: np.zeros(1)})
    with pytest.raises(UserError, match=rf"1 unexpected \({array}\)"):
        weights.load(path, overrides=overrides_of(model))


@pytest.mark.parametrize("file_format", ["native", "huggingface", "timm"])
@pytest.mark.parametrize("target", ["x", "x.safetensors"])
def test_a_flipped_bit_of_a_weight_is_found(tmp_path, file_format, target):
    weights.save(tiny_pretrained("deit"), tmp_path / target, file_format)
    path = tmp_path / target
    path = path / "model.safetensors" if path.is_dir() else path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="its weights are not those that its description was written for"):
        weights.load(tmp_path / target)


def test_a_model_that_transformers_trained_further_is_read_without_our_description(tmp_path):
    weights.save(tiny_pretrained("deit"), tmp_path / "x", "huggingface")
    other = tiny_pretrained("deit", seed=1)
    state, _ = weights.to_format(other, "huggingface")
    write_safetensors(tmp_path / "x" / "model.safetensors", state)
    edit_json(tmp_path / "x" / "config.json", transformers_version="5.0")
    edit_json(tmp_path / "x" / "preprocessor_config.json", image_mean=[0.5] * 3)
    loaded = weights.load(tmp_path / "x")
    assert_same_trees(loaded.variables, other.variables)
    assert loaded.preprocessing.mean == (0.5,) * 3


def test_arrays_of_several_dtypes_are_not_stacked(tmp_path):
    model = tiny_pretrained("deit")
    query = model.variables["params"]["block0"]["query"]
    query["kernel"] = query["kernel"].astype(np.float16)
    with pytest.raises(UserError, match="would stack arrays of different dtypes, float16, float32, float32"):
        weights.save(model, tmp_path / "x", "timm")


def test_arrays_are_left_out_when_asked(tmp_path):
    model = tiny_pretrained("deit")
    foreign_directory(tmp_path)
    pooler = {"vit.pooler.dense.weight": np.zeros((8, 8)), "vit.pooler.dense.bias": np.zeros(8)}
    write_safetensors(tmp_path / "x" / "model.safetensors", read_state(tmp_path / "x") | pooler)
    with pytest.raises(UserError, match=r"2 unexpected \(vit.pooler.dense.bias, vit.pooler.dense.weight\)"):
        weights.load(tmp_path / "x")
    loaded = weights.load(tmp_path / "x", ignored=["vit.pooler.*"])
    assert loaded.left_out == ("vit.pooler.dense.bias", "vit.pooler.dense.weight")
    assert_same_trees(loaded.variables, model.variables)


def test_the_size_of_microsoft_s_swin_is_that_of_its_masks(tmp_path):
    state = foreign_state(tiny_pretrained("swin"), "microsoft", np.random.default_rng(0))
    loaded = weights.load(write_safetensors(tmp_path / "x.safetensors", state))
    assert loaded.config.image_size == tiny_pretrained("swin").config.image_size
    assert not any(text.startswith("image_size") for text in loaded.assumed)


def test_a_window_cannot_shrink():
    with pytest.raises(UserError, match="choose a larger --image_size"):
        resize.resized(tiny_pretrained("swin"), 16)


def test_a_dangling_link_is_not_replaced(tmp_path):
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists; delete it"):
        weights.save(tiny_pretrained("deit"), tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").is_symlink()


def test_a_target_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    write = saving.write

    def slow(path, content):
        write(path, content)
        (tmp_path / "x.safetensors").write_text("another's")

    monkeypatch.setattr(saving, "write", slow)
    with pytest.raises(UserError, match="exists; delete it"):
        weights.save(tiny_pretrained("deit"), tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_text() == "another's"
