"""parity dump with the codes of BHViT and Bi-ViT, for which ``torch_bhvit`` and ``torch_bivit`` stand in."""

import argparse
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from bvit_jax import parity
from bvit_jax.errors import UserError
from bvit_jax.parity import codes, layers
from bvit_jax.parity.__main__ import main
from bvit_jax.parity.check import check
from bvit_jax.parity.dump import dump
from bvit_jax.parity.layers import layer_rows

torch = pytest.importorskip("torch")

from bvit_jax.parity.torch_side.codes import CODES  # noqa: E402
from bvit_jax.parity.torch_side.record import evaluate  # noqa: E402

TESTS = Path(__file__).parents[1]
BHVIT, BIVIT = TESTS / "torch_bhvit", TESTS / "torch_bivit"
SMALL_BHVIT = {
    "image_size": 32,
    "window_size": 1,
    "hidden_size": [4, 8, 16, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "intermediate_size": [8, 16, 32, 64],
    "nb_classes": 5,
}
SMALL_DEIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_classes": 5}
SMALL_SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 4]}
SMALL_SWIN |= {"window_size": 4, "num_classes": 5}
TWO = {"image_size": 64, "window_size": 2}  # windows in stage 3, merged tokens in both


# --- the stand-in computes what the code does -----------------------------------------------------


def subject_of(meta):
    """Returns the subject on the PyTorch side for the ``meta`` of a golden file of Bi-ViT's code."""
    settings = {"case": meta["case"].removesuffix("_nodist"), **meta["kwargs"]}
    if "depths" not in settings:
        settings.setdefault("distilled", True)
    return CODES["bivit"](str(BIVIT), settings, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bivit_deit", "bivit_deit_nodist", "bivit_swin", "deit_distilled", "swin"])
def test_stand_in_agrees_with_golden_files(clean_modules, golden_file, name):
    golden = parity.GoldenFile(golden_file(name))
    subject = subject_of(golden.meta)
    model = subject.build().double()
    state = golden.group("state") | golden.group("init_state") | golden.group("state2")
    model.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()}, strict=False)
    images = torch.from_numpy(golden.float64("input/images"))
    output, _ = evaluate(subject, model, images)
    assert torch.from_numpy(golden.array("eval/logits")).allclose(output.logits, rtol=0, atol=1e-12)
    targets = {"teacher_logits": torch.from_numpy(golden.float64("input/teacher_logits"))}
    targets["labels"] = torch.from_numpy(golden.array("input/labels"))
    loss = subject.loss(subject.heads(model.train(), images), targets)
    assert loss.item() == pytest.approx(float(golden.array("train/loss")), rel=1e-13)
    loss.backward()
    gradients = golden.group("grad")
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in gradients:
            difference = parameter.grad.numpy() - gradients[parameter_name]
            assert np.abs(difference).max() < 1e-7 * largest, parameter_name


# --- dump, check, layers -------------------------------------------------------------------------


def dumped(path, repo, model, overrides, **arguments):
    dump(path, repo, model=model, overrides=overrides, **arguments)
    return parity.GoldenFile(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repo", "model", "overrides"),
    [
        (BHVIT, "bhvit", SMALL_BHVIT),
        (BIVIT, "bivit_release_deit", SMALL_DEIT),
        (BIVIT, "bivit_release_swin", SMALL_SWIN),
    ],
)
def test_layers_of_a_dump(in_process, tmp_path, monkeypatch, repo, model, overrides):
    monkeypatch.setattr(layers, "NARROW", {})
    path = tmp_path / "model.npz"
    golden = dumped(path, repo, model, overrides)
    rows = list(layer_rows(path))
    assert [row.name for row in rows] == list(golden.group("trace"))
    assert all(row.passed for row in rows), [row.name for row in rows if not row.passed]
    assert golden.group("state2").keys() == golden.group("init_state").keys() > set()
    assert any(0 <= share < 0.1 for share in golden.group("flips").values())


@pytest.mark.slow
def test_check_of_a_dump(in_process, tmp_path):
    dumped(tmp_path / "model.npz", BIVIT, "bivit_release_deit", SMALL_DEIT)
    rows = {row.group: row for row in check(tmp_path / "model.npz")}
    assert {"first logits", "first state", "eval logits", "gradients", "input gradient"} <= rows.keys()
    assert all(row.passed for row in rows.values())


@pytest.mark.slow
def test_blocks_of_a_dump(in_process, tmp_path):
    golden = dumped(tmp_path / "model.npz", BHVIT, "bhvit:fp_downsample", SMALL_BHVIT | TWO)
    hidden, attentions = golden.group("eval/hidden"), golden.group("eval/attention")
    assert [hidden[str(i)].shape for i in range(5)] == [
        (2, 256, 4),
        (2, 64, 8),
        (2, 16, 16),
        (2, 4, 32),
        (2, 4, 32),
    ]
    assert {name: array.shape for name, array in attentions.items()} == {"0": (8, 2, 8, 8), "1": (2, 2, 5, 5)}
    assert "vit.encoder.patch_embed1.proj" not in golden.group("flips")


# --- what is replaced ------------------------------------------------------------------------------


@pytest.mark.slow
def test_patches_are_listed(in_process, tmp_path):
    golden = dumped(tmp_path / "a.npz", BHVIT, "bhvit", SMALL_BHVIT | {"gsb": True})
    assert golden.meta["patches"] == ["timm", "stem", "gsb", "window"]
    assert golden.meta["args"]["gsb"]
    swin = tmp_path / "checkout"
    shutil.copytree(BIVIT, swin, ignore=shutil.ignore_patterns("__pycache__"))
    with (swin / "bi_swin_transformer.py").open("ab") as file:
        file.write(bytes(9))
    golden = dumped(tmp_path / "b.npz", swin, "bivit_release_swin", SMALL_SWIN)
    missing = ["Binary_plus", "lsq_plus", "_quan_base_plus"]
    assert golden.meta["patches"] == [*missing, "timm", "grad_scale", "sums", "zeros", "pretrained"]


def checkpoint(path, code, repo, settings, overrides, args):
    subject = CODES[code](str(repo), settings, overrides)
    model = subject.build()
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**args)}, path)
    return path


@pytest.mark.slow
def test_checkpoint_of_bhvit(in_process, clean_modules, tmp_path):
    """The arguments are spelt as in the script of the code."""
    settings = codes.BHVIT.settings("bhvit") | {"nb_classes": 3}
    args = settings | {"model": "configs/BHVIT", "model_type": "BHVIT"}
    sizes = {key: value for key, value in SMALL_BHVIT.items() if key != "nb_classes"}
    saved = checkpoint(tmp_path / "best.pth", "bhvit", BHVIT, settings, sizes, args)
    clean_modules()
    golden = dumped(tmp_path / "model.npz", BHVIT, None, sizes, checkpoint=saved)
    assert golden.meta["patches"][0] == "script"
    assert (golden.meta["num_classes"], golden.meta["weights_dtype"]) == (3, "float32")
    name = "vit.encoder.layerB.0.attention.attention.att_prob_quantizer.alpha"
    assert not np.array_equal(golden.array(f"state/{name}"), golden.array(f"state2/{name}"))


@pytest.mark.slow
def test_checkpoint_of_bivit(in_process, clean_modules, tmp_path):
    settings = codes.BIVIT.settings("bivit_release_deit")
    args = {"model": "bi_deit_tiny_patch16_224", "input_size": 16, "nb_classes": 5}
    subset = {"img_size": 16, "num_classes": 5, "depth": 1, "embed_dim": 24}
    saved = checkpoint(tmp_path / "best.pth", "bivit", BIVIT, settings, subset, args)
    clean_modules()
    golden = dumped(tmp_path / "a.npz", BIVIT, None, {"depth": 1, "embed_dim": 24}, checkpoint=saved)
    assert golden.meta["kwargs"]["distilled"]
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(**args, other=1)}, saved)
    with pytest.raises(UserError, match="arrays of the model are not in the checkpoint"):
        dumped(tmp_path / "b.npz", BIVIT, None, {}, checkpoint=saved)
    args["model"] = "cait"
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(**args)}, saved)
    with pytest.raises(UserError, match="args is 'cait'; expected one of bi_deit_tiny"):
        dumped(tmp_path / "b.npz", BIVIT, None, {}, checkpoint=saved)


# --- which code it is --------------------------------------------------------------------------------


def test_codes_are_recognised(tmp_path):
    found = [codes.code_of(repo).name for repo in (BHVIT, BIVIT, TESTS / "torch_reference")]
    assert found == ["bhvit", "bivit", "binaryvit"]
    with pytest.raises(UserError, match=r"BinaryViT, .*/Bi-ViT or .*/BHViT$"):
        codes.code_of(tmp_path)


@pytest.mark.parametrize(
    ("repo", "arguments", "message"),
    [
        (BHVIT, ["--model=binaryvit_small"], "did you mean"),
        (BHVIT, ["--model=bhvit", "--set=dept=1"], "has no such key; known: model, model_type"),
        (BIVIT, ["--model=bhvit"], "--model is 'bhvit'"),
        (
            BIVIT,
            ["--model=swin:tiny", "--set=depth=1"],
            "SwinTransformer has no such argument; known: img_size",
        ),
    ],
)
def test_refused(in_process, tmp_path, capsys, repo, arguments, message):
    assert main(["dump", str(tmp_path / "out.npz"), "--repo", str(repo), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(itertools.islice(tmp_path.iterdir(), 1))
