"""The convert command: workdirs, sizes, heads, and one-line errors."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from bvit_jax import cli, optim, weights
from bvit_jax import config as config_lib
from bvit_jax.errors import UserError
from bvit_jax.models import create_model
from bvit_jax.runtime.mesh import make_mesh, replicated
from bvit_jax.training.steps.state import create_state
from bvit_jax.weights import tensor_files as files
from bvit_jax.workdir import runs
from bvit_jax.workdir.checkpoint import Checkpoints
from configs import deit_digits, digits
from tests.tiny_models import assert_same_trees, tiny_pretrained


def main(arguments: list[str]) -> int:
    return cli.main(["convert", *arguments])


def make_run(path: Path, config) -> dict:
    """Writes what a training run of no steps would leave behind; returns its variables."""
    path.mkdir()
    config_lib.save(config, path / "config.json")
    optimizer = optim.make_optimizer(config.optim, lambda step: 1.0)
    model, size = create_model(config.model), config.model.image_size
    state = jax.jit(lambda key: create_state(key, model, optimizer, size))(jax.random.key(0))
    state = dataclasses.replace(state, step=np.int32(7))
    state = jax.device_put(state, replicated(make_mesh(jax.devices()[:1])))
    checkpoints = Checkpoints(path, keep=1)
    checkpoints.save(7, state, {})
    checkpoints.close()
    return jax.tree.map(np.asarray, state.variables)


@pytest.fixture(scope="module")
def binary_run(tmp_path_factory):
    """The directory of a run, its configuration and its variables; nobody writes into it."""
    path = tmp_path_factory.mktemp("convert") / "run"
    config = digits.get_config()
    config.model.depth = (1, 1)
    variables = make_run(path, config)
    runs.write_class_names(path, [str(i) for i in range(10)])
    return path, config, variables


@pytest.fixture
def source(tmp_path):
    """A Facebook DeiT whose heads have 64 channels."""
    state, _ = weights.to_format(tiny_pretrained("deit", width=64, num_heads=1), "timm")
    path = tmp_path / "deit.safetensors"
    path.write_bytes(files.encode_safetensors(state, {}))
    return path


def error_of(capsys, *arguments) -> str:
    """Runs the command, asserts that it fails with one line, and returns that line."""
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# --- training runs -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_binary_run_goes_to_pytorch_and_back(tmp_path, binary_run, capsys):
    run, config, variables = binary_run
    assert main([str(run), str(tmp_path / "x.safetensors"), "--format=reference"]) == 0
    assert "binaryvit" in capsys.readouterr().out
    state, _ = files.read_safetensors(tmp_path / "x.safetensors")
    assert state["vit.layernorm.num_batches_tracked"] == 7  # steps
    assert main([str(tmp_path / "x.safetensors"), str(tmp_path / "native")]) == 0
    model = weights.load(tmp_path / "native")
    assert model.config == config.model
    assert_same_trees(model.variables, variables)
    assert model.preprocessing == weights.Preprocessing(32, 32, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert model.class_names == tuple("0123456789")
    assert [entry["format"] for entry in model.history] == ["run", "reference"]
    assert model.history[0]["file"] == "checkpoints/7"
    assert model.history[0]["sha256"] == files.sha256(run / "checkpoints" / "7" / "checksums.json")


@pytest.mark.slow
def test_the_deit_of_a_run_goes_to_hugging_face(tmp_path):
    config = deit_digits.get_config()
    config.model.depth = 1
    variables = make_run(tmp_path / "run", config)
    assert main([str(tmp_path / "run"), str(tmp_path / "x"), "--format=huggingface"]) == 0
    model = weights.load(tmp_path / "x")
    assert model.config == config.model
    assert_same_trees(model.variables["params"], variables["params"])
    assert model.class_names[9] == "class 9"  # a run without names


@pytest.mark.slow
def test_options_of_files_mean_nothing_for_a_run(tmp_path, binary_run, capsys):
    run, _, _ = binary_run
    assert "describes itself; leave out the options for files" in error_of(
        capsys, run, tmp_path / "x", "--set=num_heads=(1,2)"
    )
    assert "no best checkpoint" in error_of(capsys, run, tmp_path / "x", "--checkpoint=best")


@pytest.mark.parametrize("text", ["", "[]", '["only one"]', "[1,2,3,4,5,6,7,8,9,10]"])
def test_damaged_class_names(tmp_path, text):
    (tmp_path / runs.CLASSES_FILE).write_text(text)
    with pytest.raises(UserError, match=f"cannot read {tmp_path / runs.CLASSES_FILE}"):
        runs.read_class_names(tmp_path, 10)


# --- options -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_assumed_and_left_out_is_said(tmp_path, source, capsys):
    assert main([str(source), str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    assert "assumed, since the file does not say: num_heads 1 (64 channels each); norm_epsilon 1e-06" in out
    state, _ = weights.to_format(tiny_pretrained("binaryvit"), "reference")
    (tmp_path / "b.safetensors").write_bytes(files.encode_safetensors(state, {}))
    settings = ["--set=num_heads=(1,2)", "--set=reduction=(2,1)", "--set=weight_bits=1"]
    assert main([str(tmp_path / "b.safetensors"), str(tmp_path / "y"), *settings]) == 0
    assert "assumed, since" not in capsys.readouterr().out


@pytest.mark.slow
def test_arrays_that_are_never_read_are_kept_and_counted(tmp_path, capsys):
    state, _ = weights.to_format(tiny_pretrained("bivit_release_deit"), "bivit")
    state["blocks.1.attn.qkv.bias"] += 1
    source = tmp_path / "b.safetensors"
    source.write_bytes(files.encode_safetensors(state, {}))
    assert main([str(source), str(tmp_path / "x")]) == 0
    expected = "kept, though the model never reads them: 8 arrays such as blocks.0.attn.proj.bias"
    assert expected in capsys.readouterr().out
    kept = weights.load(tmp_path / "x")
    assert kept.unused() == tuple(sorted(name for name in state if name in kept.bookkeeping))
    back, _ = weights.to_format(kept, "bivit")
    assert (back["blocks.1.attn.qkv.bias"] == 1).all()
    state["blocks.1.attn.qkv.bias"] = state["blocks.1.attn.qkv.bias"][1:]
    source.write_bytes(files.encode_safetensors(state, {}))
    assert main([str(source), str(tmp_path / "y")]) != 0
    assert "blocks.1.attn.qkv.bias differs from the one" in capsys.readouterr().err


def test_settings(tmp_path, source):
    arguments = ["--set", "num_heads=4", "--set", "norm_epsilon=1e-12", "--set", "weight_init=trunc_normal"]
    assert main([str(source), str(tmp_path / "x"), *arguments]) == 0
    config = weights.load(tmp_path / "x").config
    assert (config.num_heads, config.norm_epsilon, config.weight_init) == (4, 1e-12, "trunc_normal")


def test_another_size_and_other_classes(tmp_path, source):
    names = tmp_path / "names.txt"
    names.write_text("cat\nn01440764\n")
    arguments = ["--image_size=64", "--reset_head=2", f"--class_names={names}"]
    assert main([str(source), str(tmp_path / "x"), *arguments]) == 0
    model = weights.load(tmp_path / "x")
    assert model.config.image_size == 64
    assert model.class_names == ("cat", "tench, Tinca tinca")
    assert model.variables["params"]["head"]["bias"].shape == (2,)


def test_names_without_a_new_head(tmp_path, source):
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert main([str(source), str(tmp_path / "x"), f"--class_names={tmp_path / 'names.txt'}"]) == 0
    assert weights.load(tmp_path / "x").class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set=heads=4"], "config.model.heads is not a setting of deit"),
        (["--set=num_heads=5"], "config.model.width is 64: expected a multiple of its 5 heads"),
        (["--set=num_heads=four"], "config.model.num_heads is 'four': expected a whole number"),
        (["--set=width=32"], "arrays that do not fit the model"),
        (
            ["--format=onnx"],
            "no format 'onnx'; known: bhvit, bivit, huggingface, microsoft, native, reference, timm",
        ),
        (["--format=microsoft"], "has no 'deit', only swin"),
        (["--config=none.json"], "no file none.json"),
        (["--image_size=50"], "config.model.image_size is 50"),
        (["--class_names=none.txt"], "cannot read none.txt"),
        (["--key=model"], "is not a .pth file; leave out --key"),
    ],
)
def test_wrong_options(tmp_path, source, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert message in error_of(capsys, source, tmp_path / "x", *arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_too_few_names(tmp_path, source, capsys):
    (tmp_path / "names.txt").write_text("a\nb\n")
    line = error_of(capsys, source, tmp_path / "x", f"--class_names={tmp_path / 'names.txt'}")
    assert "has 2 lines; expected the names of 3 classes" in line


def test_the_checkpoint_of_what_is_no_run(tmp_path, source, capsys):
    line = error_of(capsys, source, tmp_path / "x", "--checkpoint=best")
    assert "is no training run, of which the best checkpoint could be taken" in line


def test_numbers_that_are_not_finite_are_reported(tmp_path, source, capsys):
    state, metadata = files.read_safetensors(source)
    state["head.bias"] = np.full(3, np.nan, np.float32)
    source.write_bytes(files.encode_safetensors(state, metadata))
    assert main([str(source), str(tmp_path / "x")]) == 0
    assert (
        "1 arrays hold numbers that are not finite, the first is params/head/bias" in capsys.readouterr().out
    )


def test_a_name_that_is_too_long(tmp_path, source, capsys):
    assert "too long" in error_of(capsys, source, tmp_path / ("x" * 300))
    assert "too long" in error_of(capsys, tmp_path / ("x" * 300), tmp_path / "x")


def test_hugging_face_s_directory_with_checkpoints_is_no_run(tmp_path):
    weights.save(tiny_pretrained("deit"), tmp_path / "x", "huggingface")
    (tmp_path / "x" / "checkpoints").mkdir()
    assert not runs.is_run(tmp_path / "x")
    assert main([str(tmp_path / "x"), str(tmp_path / "y")]) == 0


@pytest.mark.parametrize("value", ["0", "-3", "x"])
def test_wrong_numbers(tmp_path, source, capsys, value):
    assert main([str(source), str(tmp_path / "x"), f"--reset_head={value}"]) == 2
    assert "argument --reset_head" in capsys.readouterr().err


def test_wrong_settings(tmp_path, source, capsys):
    assert main([str(source), str(tmp_path / "x"), "--set=num_heads"]) == 2
    assert "'num_heads' is not KEY=VALUE" in capsys.readouterr().err


# --- errors ------------------------------------------------------------------------------------


def test_an_existing_target_is_refused_before_the_work(tmp_path, capsys):
    assert f"{tmp_path} exists" in error_of(capsys, tmp_path / "none", tmp_path)


def test_no_source(tmp_path, capsys):
    assert "no file or directory" in error_of(capsys, tmp_path / "none", tmp_path / "x")


def test_all_arrays_that_do_not_fit_are_listed_on_request(tmp_path, source, capsys):
    state, metadata = files.read_safetensors(source)
    few = {name: array for name, array in state.items() if "norm" not in name or name == "norm.weight"}
    few["blocks.0.norm1.weight"] = state["blocks.0.norm1.weight"]
    few["blocks.1.norm1.weight"] = state["blocks.1.norm1.weight"]
    source.write_bytes(files.encode_safetensors(few, metadata))
    missing = sorted(state.keys() - few.keys())
    assert "7 missing (blocks.0.norm1.bias, " in error_of(capsys, source, tmp_path / "x")
    assert main([str(source), str(tmp_path / "x"), "--verbose"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == [f"missing: {name}" for name in missing]
    assert lines[-1].startswith("error: ")


def test_a_run_of_something_else(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "no config.json in" in error_of(capsys, tmp_path / "run", tmp_path / "x")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": 3}))
    assert "is not the configuration of a run" in error_of(capsys, tmp_path / "run", tmp_path / "x")
