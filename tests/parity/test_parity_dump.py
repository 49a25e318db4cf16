"""The parity commands against PyTorch: dump, check and layers, and what they refuse.

``torch_reference`` stands in for the checkout; the golden files show that it computes the same.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bvit_jax import parity
from bvit_jax.parity import layers
from bvit_jax.parity.__main__ import main
from bvit_jax.parity.check import check
from bvit_jax.parity.dump import load_images
from bvit_jax.parity.layers import layer_rows

torch = pytest.importorskip("torch")

REPO = Path(__file__).parents[1] / "torch_reference"
SMALL = "--set=nb_classes=7"
NAMES = (
    "binaryvit_small",
    "binaryvit_small:some_fp",
    "react_deit_small:cls",
    "react_deit_small:ls",
    "deit_small",
)


def dump(out, *arguments, repo=REPO):
    return main(["dump", str(out), "--repo", str(repo), *map(str, arguments)])


def dumped(out, *arguments, repo=REPO):
    """Returns the file after a dump that must work."""
    assert dump(out, *arguments, repo=repo) == 0
    return out


@pytest.fixture(scope="module")
def reference():
    """The module ``models`` of the stand-in."""
    spec = importlib.util.spec_from_file_location("torch_reference_models", REPO / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def binaryvit(tmp_path_factory):
    """A file that a process of the PyTorch side wrote."""
    return dumped(tmp_path_factory.mktemp("dump") / "binaryvit.npz", "--model=binaryvit_small", SMALL)


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory):
    """A file as the reference's training saves it."""
    args = argparse.Namespace(
        model="elsewhere/configs/binaryvit-small-patch4-224",
        model_type="extra-res-pyramid",
        weight_bits=1,
        input_bits=1,
        nb_classes=5,
        avg_res3=True,
        avg_res5=False,
        replace_ln_bn=True,
        disable_layerscale=False,
        enable_cls_token=False,
        some_fp=False,
        drop_path=0.1,
        lr=5e-4,
    )
    config = REPO / "configs/binaryvit-small-patch4-224"
    torch.manual_seed(3)
    model = reference.get_model(args, config, args.model_type, 1, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 0:
                parameter += 0.1 * torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "args": args}
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    torch.save(content, path)
    return path


# --- the stand-in computes what the reference does ---------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deit", "react_deit", "react_deit_steps", "binaryvit", "binaryvit_some_fp", "binaryvit_w1a32"]
)
def test_stand_in_agrees_with_golden_files(golden_file, reference, monkeypatch, name):
    golden = parity.GoldenFile(golden_file(name))
    meta = golden.meta
    values = {"image_size": 224, "patch_size": 16, **meta["config"]}
    monkeypatch.setattr(reference.ViTConfig, "from_pretrained", lambda _: SimpleNamespace(**values))
    args = argparse.Namespace(**meta["args"])
    model = reference.get_model(args, None, meta["model_type"], meta["weight_bits"], meta["input_bits"])
    state = {n: torch.from_numpy(a) for n, a in golden.group("state").items() if not n.endswith("clip_val")}
    model.double().load_state_dict(state)
    images, teacher = (torch.from_numpy(golden.float64(f"input/{n}")) for n in ("images", "teacher_logits"))
    model.eval()
    assert torch.from_numpy(golden.array("eval/logits")).allclose(model(images).logits, rtol=0, atol=1e-13)
    loss = -(teacher.softmax(1) * model.train()(images).logits.log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(float(golden.array("train/loss")), rel=1e-13)
    gradients = golden.group("grad")
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        difference = parameter.grad.numpy() - gradients[parameter_name]
        assert np.abs(difference).max() < 1e-7 * largest


# --- dump, check, layers -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_dump_then_check_and_layers(in_process, tmp_path, capsys, name):
    path = dumped(tmp_path / "model.npz", f"--model={name}", SMALL)
    assert capsys.readouterr().out.startswith(f"{path}: ")
    golden = parity.GoldenFile(path)
    assert {a.dtype for n, a in golden.arrays.items() if "num_batches" not in n} == {np.dtype(np.float64)}
    assert golden.array("eval/logits").shape == (2, 7)
    assert os.listdir(tmp_path) == ["model.npz"]

    assert main(["check", str(path)]) == 0
    groups = {line[2:22].strip() for line in capsys.readouterr().out.splitlines()[1:]}
    assert {"inputs", "eval hidden", "eval attention", "gradients", "input gradient"} <= groups
    assert ("running statistics" in groups) == (name != "deit_small")

    if name not in ("binaryvit_small", "deit_small"):
        return
    assert main(["layers", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(path)
    assert [line.split()[0] for line in lines[3:-1]] == list(golden.group("trace"))
    assert lines[-1].startswith("  no difference in float64")


@pytest.mark.slow
def test_the_trace_holds_every_layer_in_order(binaryvit, reference):
    golden = parity.GoldenFile(binaryvit)
    names = list(golden.group("trace"))
    owners = {name.rpartition(".")[0].removesuffix(".prelu") for name in golden.group("grad")}
    # Parameters of modules that hold other modules are shifts, scales and positions.
    containers = {name for name in owners if any(n.startswith(name + ".") for n in names)}
    assert set(names) == owners - containers - {"vit.embeddings"}
    assert names[0] == "vit.embeddings.patch_embeddings.projection"
    assert names[-1] == "classifier"
    stages = [names.index(f"vit.encoder.{n}") for n in ("layer.0.output.dense", "patch_embed1.proj")]
    assert stages == sorted(stages)
    assert all(0 < array.size <= 4096 for array in golden.group("trace").values())


@pytest.mark.slow
def test_flips_are_those_of_every_binary_product(binaryvit):
    golden = parity.GoldenFile(binaryvit)
    flips = golden.group("flips")
    expected = {
        name
        for name in golden.group("trace")
        if name.endswith(
            (".dense", ".query", ".key", ".value", ".reduction", ".proj", "rpreluq", "rpreluk", "rpreluv")
        )
    }
    assert flips.keys() == expected
    rows = {row.name: row for row in layer_rows(binaryvit)}
    assert {name for name, row in rows.items() if row.flips} == expected
    for name in expected:
        assert rows[name].flips["torch float32"] == flips[name]
        assert 0 <= rows[name].flips["float32"] < 0.01
    # Rounding to bfloat16 flips signs in nearly every layer.
    assert sum(rows[name].flips["bfloat16"] > 0 for name in expected) > len(expected) / 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file(in_process, binaryvit, tmp_path):
    again = dumped(tmp_path / "again.npz", "--model=binaryvit_small", SMALL)
    assert again.read_bytes() == binaryvit.read_bytes()
    other = parity.GoldenFile(dumped(tmp_path / "other.npz", "--model=binaryvit_small", SMALL, "--seed=1"))
    for name, array in parity.GoldenFile(binaryvit).arrays.items():
        if name.startswith(("state/", "input/")) and "num_batches" not in name:
            assert np.mean(other.arrays[name] != array) > 0.5, name


@pytest.mark.slow
def test_compact_files_are_checked_too(in_process, binaryvit, tmp_path):
    path = dumped(tmp_path / "compact.npz", "--model=binaryvit_small", SMALL, "--compact")
    assert path.stat().st_size < 0.7 * binaryvit.stat().st_size
    golden = parity.GoldenFile(path)
    assert golden.array("state/classifier.weight").dtype == np.float16
    assert golden.array("eval/hidden/0").dtype == np.float64  # 1024 elements
    assert golden.array("grad_input/images").dtype == np.float32
    assert main(["check", str(path)]) == 0  # by the programs of the file that is not compact


@pytest.mark.slow
def test_checkpoint_with_images(in_process, checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    images = [tmp_path / "a.jpg", tmp_path / "b.png", tmp_path / "c.png"]
    for path, shape in zip(images, [(50, 70, 3), (40, 40, 3), (30, 36)], strict=True):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    out = dumped(tmp_path / "model.npz", "--checkpoint", checkpoint, "--images", *images)
    golden = parity.GoldenFile(out)
    np.testing.assert_array_equal(golden.array("input/images"), load_images(images, 32))
    weights = torch.load(checkpoint, weights_only=False)["model"]
    assert golden.group("state").keys() == weights.keys()
    for name, array in golden.group("state").items():
        np.testing.assert_array_equal(array, weights[name].numpy())
    meta = golden.meta
    assert (meta["model_type"], meta["num_classes"], meta["weights_dtype"]) == (
        "extra-res-pyramid",
        5,
        "float32",
    )
    assert meta["args"]["avg_res5"] is False
    assert meta["checkpoint"] == "best.pth"
    assert meta["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert meta["torch"] == torch.__version__
    assert "commit" not in meta  # the stand-in is no repository of its own
    rows = list(itertools.islice(check(out), 4))  # of training, other files tell enough
    assert [row.group for row in rows] == ["inputs", "eval logits", "eval hidden", "eval attention"]
    assert all(row.passed for row in rows)


def test_images_are_evaluated_as_by_torchvision(tmp_path):
    pixels = np.full((64, 64, 3), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "white.png")
    expected = (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    images = load_images([tmp_path / "white.png"], 28)
    assert images.shape == (1, 3, 28, 28)
    np.testing.assert_allclose(images[0, :, 5, 5], expected, rtol=1e-6)


@pytest.mark.slow
def test_state_dict_without_arguments(in_process, checkpoint, tmp_path, capsys):
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(checkpoint, weights_only=False)["model"], bare)
    assert "holds no 'args'; say with --model NAME" in refused(tmp_path, capsys, "--checkpoint", bare)
    arguments = ("--model=binaryvit_small", "--set=avg_res5=false", "--checkpoint", bare)
    golden = parity.GoldenFile(dumped(tmp_path / "model.npz", *arguments))
    assert golden.meta["num_classes"] == 5


# --- differences are located -------------------------------------------------------------------


def first_difference(path, capsys):
    """Returns PyTorch's and our name of the first layer that differs."""
    assert main(["layers", str(path)]) == 1
    out = capsys.readouterr().out
    failed = [line.split()[0] for line in out.splitlines() if "  FAIL  " in line]
    _, _, name, path, *_ = out.splitlines()[-1].split()
    assert name == failed[0]
    assert path.endswith(";")
    return name, path.strip("();")


ATTENTION = "vit.encoder.layer.1.attention.attention"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "ours"),
    [
        (f"{ATTENTION}.query", "block1/attention/query/dense"),
        ("vit.encoder.patch_embed1.proj", "downsample1/conv"),
    ],
)
def test_another_shift_in_the_pytorch_code_is_located(in_process, tmp_path, capsys, module, ours):
    """The checkout's code adds something in front of one module; the weights know nothing of it."""
    repo = tmp_path / "checkout"
    shutil.copytree(REPO, repo, ignore=shutil.ignore_patterns("__pycache__"))
    with (repo / "models.py").open("a") as file:
        file.write(
            f"""
original = get_model
def get_model(*args):
    model = original(*args)
    model.get_submodule({module!r}).register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))
    return model
"""
        )
    path = dumped(tmp_path / "shifted.npz", "--model=binaryvit_small", SMALL, repo=repo)
    assert first_difference(path, capsys) == (module, ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("array", "module"),
    [
        ("vit.encoder.layer.1.intermediate.norm.bias", "vit.encoder.layer.1.intermediate.norm"),
        # What belongs to no layer shows in the first one behind it.
        ("vit.encoder.patch_embed1.position_embeddings", "vit.encoder.layer.1.layernorm_before"),
    ],
)
def test_a_changed_weight_is_located(binaryvit, tmp_path, capsys, array, module):
    with np.load(binaryvit) as archive:
        arrays = dict(archive)
    arrays[f"state/{array}"] = arrays[f"state/{array}"] + 0.5
    path = tmp_path / "changed.npz"
    np.savez(path, **arrays)
    assert first_difference(path, capsys)[0] == module


@pytest.mark.slow
def test_layers_that_only_one_side_has(binaryvit, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "NARROW", {})
    with np.load(binaryvit) as archive:
        arrays = dict(archive)
    arrays["trace/vit.extra"] = arrays["trace/vit.layernorm"]
    del arrays["trace/vit.layernorm"]
    path = tmp_path / "changed.npz"
    np.savez(path, **arrays)
    failed = {row.name: row.path for row in layer_rows(path) if not row.passed}
    assert failed == {"vit.extra": "", "vit.layernorm": "norm"}


def test_layers_of_a_file_without_a_trace(golden_file, capsys):
    path = golden_file("react_deit")
    assert main(["layers", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: the file has no trace/*")
    assert err.count("\n") == 1


# --- what dump refuses -------------------------------------------------------------------------


def refused(directory, capsys, *arguments, repo=REPO):
    """Returns the message of a dump that must be refused in one line and leave nothing behind."""
    before = sorted(os.listdir(directory))
    assert dump(directory / "out.npz", *arguments, repo=repo) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(os.listdir(directory)) == before
    return err


def executable(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


NAMED = "--model=binaryvit_small"


@pytest.mark.parametrize("files", [[], ["models.py"]])
def test_not_a_checkout(tmp_path, capsys, files):
    for name in files:
        (tmp_path / name).touch()
    message = refused(tmp_path, capsys, NAMED, repo=tmp_path)
    assert f"--repo is {tmp_path}" in message
    assert "expected a checkout of github.com/Phuoc-Hoan-Le/BinaryViT" in message


def test_arguments_that_make_no_sense(in_process, tmp_path, capsys):
    assert "neither --model nor --checkpoint" in refused(tmp_path, capsys)
    assert "did you mean 'binaryvit_small'?" in refused(tmp_path, capsys, "--model=binaryvit_smal")
    assert "--batch is 0" in refused(tmp_path, capsys, NAMED, "--batch=0")
    assert "but there are 1 --images" in refused(tmp_path, capsys, NAMED, "--batch=2", "--images", "a.jpg")
    assert "expected KEY=VALUE" in refused(tmp_path, capsys, NAMED, "--set=depths")
    assert "no such key" in refused(tmp_path, capsys, NAMED, "--set=depth=[1]")
    assert "is not a file" in refused(tmp_path, capsys, "--checkpoint", tmp_path / "missing.pth")


def test_target_in_a_missing_directory(tmp_path, capsys):
    assert dump(tmp_path / "missing" / "out.npz", NAMED) == 2
    assert "no directory" in capsys.readouterr().err


def test_existing_files_are_kept(tmp_path, capsys):
    (tmp_path / "out.npz").write_text("precious")
    assert "exists; remove it" in refused(tmp_path, capsys, NAMED)
    assert (tmp_path / "out.npz").read_text() == "precious"


def test_python_without_torch(tmp_path, capsys):
    # -S: without the site-packages
    python = executable(tmp_path / "python", f'exec "{sys.executable}" -I -S "$@"')
    message = refused(tmp_path, capsys, NAMED, "--python", python)
    assert "has no module" in message
    assert "name another Python with --python" in message


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 0", "wrote no file; is it a Python interpreter?"),
        ("exit 3", "exit status 3"),
        ("kill -9 $$", "ended by signal 9; did it run out of memory?"),
        ("echo one >&2; echo two >&2; exit 1", "the PyTorch side failed: two"),
    ],
)
def test_a_python_that_is_none(tmp_path, capsys, script, message):
    python = executable(tmp_path / "python", script)
    assert message in refused(tmp_path, capsys, NAMED, "--python", python)


def test_missing_python(tmp_path, capsys):
    message = refused(tmp_path, capsys, NAMED, "--python", tmp_path / "python3.99")
    assert "No such file or directory" in message


def test_images_that_cannot_be_read(in_process, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("no image")
    for name, message in (("text.jpg", "expected a JPEG or PNG"), ("missing.jpg", "No such file")):
        assert message in refused(tmp_path, capsys, NAMED, "--images", tmp_path / name)


def test_code_that_fails(in_process, tmp_path, capsys):
    assert "cannot build the model: " in refused(tmp_path, capsys, NAMED, "--set=hidden_size=[8]")
    # The grid of 5×5 tokens does not halve.
    assert "cannot run the model: RuntimeError: " in refused(tmp_path, capsys, NAMED, "--set=image_size=20")
    repo = tmp_path / "checkout"
    shutil.copytree(REPO, repo, ignore=shutil.ignore_patterns("__pycache__"))
    for line, message in (
        ("import no_such_module", "No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError"),
        ("get_model", "invalid syntax"),
    ):
        shutil.copy(REPO / "models.py", repo / "models.py")
        text = (repo / "models.py").read_text()
        (repo / "models.py").write_text(f"{line if line != 'get_model' else 'def ='}\n{text}")
        assert message in refused(tmp_path, capsys, NAMED, repo=repo)
    shutil.rmtree(repo / "configs/binaryvit-small-patch4-224")
    assert "it has deit-small-patch16-224" in refused(tmp_path, capsys, NAMED, repo=repo)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_malicious_pickle(in_process, tmp_path, capsys):
    evil, victim = tmp_path / "evil.pth", tmp_path / "victim"
    for content in ({"model": {}, "args": Malicious(f"touch {victim}")}, Malicious(f"touch {victim}")):
        torch.save(content, evil)
        message = refused(tmp_path, capsys, "--checkpoint", evil)
        assert f"{os.system.__module__}.system" in message
        assert "which could run code" in message
        assert not victim.exists()


def test_checkpoint_with_another_class(in_process, tmp_path, capsys):
    torch.save({"model": {"a": torch.ones(1)}, "args": SimpleNamespace(a=1)}, tmp_path / "other.pth")
    assert "holds a types.SimpleNamespace" in refused(
        tmp_path, capsys, "--checkpoint", tmp_path / "other.pth"
    )


@pytest.mark.parametrize("share", [0, 0.1, 0.9])
def test_truncated_checkpoint(in_process, checkpoint, tmp_path, capsys, share):
    content = checkpoint.read_bytes()
    broken = tmp_path / "broken.pth"
    broken.write_bytes(content[: int(share * len(content))])
    message = refused(tmp_path, capsys, "--checkpoint", broken)
    assert f"cannot read {broken}: " in message
    assert "is it complete?" in message


def test_files_that_are_no_checkpoints(in_process, tmp_path, capsys):
    other = tmp_path / "other.pth"
    for content in ([1, 2], {"model": {}}):
        torch.save(content, other)
        assert "holds no state dict" in refused(tmp_path, capsys, "--checkpoint", other)
    other.write_text("not a pickle")
    assert "cannot read" in refused(tmp_path, capsys, "--checkpoint", other)


def test_checkpoint_of_another_model(in_process, checkpoint, tmp_path, capsys):
    message = refused(tmp_path, capsys, "--checkpoint", checkpoint, "--model=deit_small")
    assert "arrays of the model are not in the checkpoint, the first is" in message
    message = refused(tmp_path, capsys, "--checkpoint", checkpoint, "--set=avg_res3=false")
    assert "arrays of the checkpoint are unknown" in message
    message = refused(tmp_path, capsys, "--checkpoint", checkpoint, "--set=nb_classes=6")
    assert "has shape (5" in message
    content = torch.load(checkpoint, weights_only=False)
    del content["args"].some_fp
    torch.save(content, tmp_path / "old.pth")
    message = refused(tmp_path, capsys, "--checkpoint", tmp_path / "old.pth")
    assert "have no some_fp; say with --model" in message


def test_weights_dtype_must_be_known(golden_file, tmp_path, capsys):
    with np.load(golden_file("deit")) as archive:
        arrays = dict(archive)
    meta = json.loads(str(arrays["meta"][()]))
    arrays["meta"] = np.array(json.dumps(meta | {"weights_dtype": "int8"}))
    np.savez(tmp_path / "odd.npz", **arrays)
    assert main(["check", str(tmp_path / "odd.npz")]) == 2
    assert "weights_dtype is 'int8'" in capsys.readouterr().err
