"""The benchmark of the step: a tiny run of each side, and what it says when something is wrong."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "train_step.py"
TINY = {
    "image_size": "32",
    "num_classes": "10",
    "width": "(8,)",
    "depth": "(1,)",
    "num_heads": "(1,)",
    "mlp_dim": "(16,)",
    "reduction": "(2,)",
}
TINY_DEIT = {
    "image_size": "32",
    "num_classes": "10",
    "width": "16",
    "depth": "1",
    "num_heads": "2",
    "mlp_dim": "32",
}
ONE_STEP = [part for kind in ("forward", "evaluation", "training") for part in (f"--{kind}-steps", "1")]
QUICK = ("--repeats", "2", *ONE_STEP, "--ceilings-scale", "0")

# A stand-in for the PyTorch code: the parameters of the tiny DeiT above, and imports that may be
# missing. Printing while a model is built must not reach the benchmark's output.
MODELS_PY = """
import torch
from timm.models.layers import DropPath, to_2tuple, trunc_normal_
from torch import nn
from transformers import ViTConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput
from transformers.utils import logging


class ViTForImageClassification(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("building")
        width = config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels)
        patches = (config.image_size // config.patch_size) ** 2
        per_block = 4 * width * (width + 1) + width * (2 * config.intermediate_size + 5)
        others = 3 * config.patch_size**2 * width + width * (patches + 5)
        others += per_block + config.intermediate_size
        self.others = nn.Parameter(torch.zeros(others + config.extra))
        self.drop = DropPath(0.5)

    def forward(self, pixel_values):
        pooled = self.others[: self.classifier.in_features] + pixel_values.mean((1, 2, 3))[:, None]
        output = BaseModelOutput(last_hidden_state=self.drop(pooled))
        return ImageClassifierOutput(logits=self.classifier(output[0]))
"""


def run(*arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    one_device = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, **one_device, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def settings(values: dict[str, str]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def make_checkout(path: Path, extra_parameters: int = 0) -> Path:
    configs = path / "configs" / "deit-small-patch16-224"
    configs.mkdir(parents=True)
    (path / "models.py").write_text(MODELS_PY)
    values = {"hidden_act": "gelu", "extra": extra_parameters}
    (configs / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.slow
def test_measures_the_jax_side(tmp_path):
    file, picture = tmp_path / "found.json", tmp_path / "roofline.png"
    ran = run(
        *("--model", "binaryvit", "--batch", "4", *QUICK, "--ceilings-scale", "0.0001", *settings(TINY)),
        *("--json", str(file)),
    )
    assert ran.returncode == 0, ran.stderr
    assert "training, images/s" in ran.stdout
    assert "floor (share reached)" in ran.stdout
    found = json.loads(file.read_text())
    (measured,) = found["runs"]
    side = measured["sides"]["bvit_jax"]
    assert list(measured["sides"]) == ["bvit_jax"]
    assert side["settings"]["width"] == [8]
    assert side["parameters"] > 1000
    for kind in ("forward", "evaluation", "training"):
        assert len(side["images_per_second"][kind]) == 2
        assert min(side["images_per_second"][kind]) > 0
        assert 0 < side["cached_first_step_seconds"][kind] < side["compile_seconds"][kind]
        assert side["compiler_flops"][kind] > 0
        assert side["accessed_bytes"][kind] > 0
        assert 0 < side["achieved"][kind]["share_of_floor"] < 1
    assert side["memory"]["peak"] > 2**20
    assert len(found["ceilings"]["bytes_per_second"]["read"]) == 6  # three rounds before, and three after
    drawn = run(str(file), "--png", str(picture), script=SCRIPT.with_name("roofline.py"))
    assert drawn.returncode == 0, drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_measures_the_reference_beside_it(tmp_path):
    pytest.importorskip("torch")
    checkout = make_checkout(tmp_path / "checkout")
    file = tmp_path / "found.json"
    ran = run(
        *("--model", "deit_small", "--batch", "2,3", *QUICK, "--kinds", "training", *settings(TINY_DEIT)),
        *("--dtype", "bfloat16", "--reference", str(checkout), "--json", str(file)),
    )
    assert ran.returncode == 0, ran.stderr
    assert "building" not in ran.stdout
    found = json.loads(file.read_text())
    assert found["ceilings"] is None
    assert [measured["batch"] for measured in found["runs"]] == [2, 3]
    for measured in found["runs"]:
        ours, theirs = (measured["sides"][name] for name in ("bvit_jax bfloat16", "reference"))
        assert ours["parameters"] == theirs["parameters"]
        assert (ours["dtype"], theirs["dtype"]) == ("bfloat16", "float32")
        speeds = [side["images_per_second"]["training"] for side in (ours, theirs)]
        assert [len(rounds) for rounds in speeds] == [2, 2]
        ratios = [a / b for a, b in zip(*speeds, strict=True)]
        ratio = measured["ratios"]["bvit_jax bfloat16"]["reference"]
        assert min(ratios) <= ratio["training"] <= max(ratios)
        best = max(speeds[0]) / max(speeds[1])
        assert ratio["best_training"] == best
        assert f"(best {best:.2f})" in ran.stdout


def test_goes_on_where_torch_cannot_compile(monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    train_step, torch_side, workload = map(importlib.import_module, ("train_step", "torch_side", "workload"))

    class NoCompiler(torch_side.TorchSide):
        def __init__(self):
            self._kinds, self._is_compiled = ("forward",), True

        def step(self, kind):
            raise RuntimeError("No working C++ compiler found\nand twenty more lines")

    class Here:
        """A worker in this process."""

        def __init__(self, prepare):
            self.prepare, self.finished = prepare, False

        def finish(self):
            self.finished = True

    failing = Here(NoCompiler().compile)
    workers = {"reference": Here(workload.Compilation), "reference compiled": failing}
    compilation, left_out = train_step._prepare(workers)
    reason = "torch.compile failed in the forward step: No working C++ compiler found"
    assert left_out == {"reference compiled": reason}
    assert capsys.readouterr().err == f"reference compiled is left out: {reason}\n"
    assert list(workers) == list(compilation) == ["reference"]
    assert failing.finished
    with pytest.raises(workload.UserError, match=r"torch\.compile failed"):
        train_step._prepare({"reference": failing})


@pytest.mark.slow
def test_measures_augmentation():
    flags = ("--model", "deit_small", "--batch", "2", "--repeats", "1", *settings(TINY_DEIT))
    ran = run(*flags, script=SCRIPT.with_name("augmentation.py"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("deit_small: step ")
    assert ran.stdout.endswith(" % of the step\n")


@pytest.mark.slow
def test_measures_metrics_and_checkpoints(tmp_path):
    file = tmp_path / "found.json"
    flags = ("--model", "binaryvit", "--batch", "2", "--steps", "2", "--repeats", "2", "--log-every", "4")
    ran = run(*flags, *settings(TINY), "--json", str(file), script=SCRIPT.with_name("overhead.py"))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(file.read_text())
    for event, every in (("log", 4), ("checkpoint", 1281167 // 2)):
        share = found[event]["seconds"] / found["step_seconds"] / every
        assert found[event]["share"] == pytest.approx(share)
        low, high = found[event]["rounds_ratio_range"]
        assert 0 < low <= found[event]["rounds_ratio"] <= high
        assert f"{event} " in ran.stdout


def test_refuses_another_model_than_ours(tmp_path):
    pytest.importorskip("torch")
    checkout = make_checkout(tmp_path / "checkout", extra_parameters=7)
    ran = run(
        *("--model", "deit_small", "--batch", "2", *QUICK, *settings(TINY_DEIT)),
        *("--reference", str(checkout)),
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: the two models differ: ")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "binaryvt"], "--model is 'binaryvt'; did you mean 'binaryvit'?"),
        (["--model", "binaryvit", "--set", "width"], "--set is 'width'; expected KEY=VALUE"),
        (["--model", "binaryvit", "--set", "wdth=3"], "config.model.wdth is not a setting"),
        (["--model", "binaryvit", "--reference", "nowhere"], "--reference is nowhere: there is no"),
        (["--model", "binaryvit", "--compile"], "--compile is for the reference"),
        (["--model", "binaryvit", "--batch", "4,x"], "--batch has 'x'; expected whole numbers of at least 1"),
        (["--model", "binaryvit", "--batch", "0"], "--batch has '0'; expected whole numbers of at least 1"),
        (["--model", "binaryvit", "--dtype", "bfloat"], "--dtype has 'bfloat'; did you mean 'bfloat16'?"),
        (["--model", "binaryvit", "--kinds", "train"], "--kinds has 'train'; did you mean 'training'?"),
        (
            ["--model", "binaryvit", "--ceilings-scale", "7"],
            "--ceilings-scale is 7; expected a number from 0",
        ),
        (["--model", "binaryvit", "--json", "nowhere/x.json"], "--json is nowhere/x.json"),
        (["--config", "nowhere.py:x"], "--config is nowhere.py:x: there is no Python file"),
    ],
)
def test_says_what_is_wrong_in_one_line(arguments, message):
    ran = run("--batch", "2", "--ceilings-scale", "0", *arguments)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith(f"error: {message}")
    assert len(ran.stderr.splitlines()) == 1


def test_says_that_torch_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("train_step_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    checkout = make_checkout(tmp_path / "checkout")
    command = [
        "train_step.py",
        "--model",
        "binaryvit",
        "--batch",
        "2",
        "--reference",
        str(checkout),
    ]
    monkeypatch.setattr(sys, "argv", command)
    assert module.main() == 1
    assert capsys.readouterr().err.startswith("error: --reference needs torch")


def test_stands_in_for_the_outputs_of_transformers(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(SCRIPT.parent)
    output = importlib.import_module("torch_side").Output(last_hidden_state=1, hidden_states=None)
    assert output.attentions is None
    assert (output[0], output[1:]) == (1, ())


def test_reads_a_config_file(tmp_path):
    config = tmp_path / "experiment.py"
    config.write_text(
        "from bvit_jax.config import default_config\n"
        "from bvit_jax.models import model_config\n"
        "def get_config(argument):\n"
        "    config = default_config()\n"
        "    config.model = model_config('deit', depth=1, mlp_dim=int(argument))\n"
        "    return config\n"
    )
    ran = run("--config", f"{config}:32", "--batch", "2", "--ceilings-scale", "0", "--set", "width=7")
    assert ran.returncode == 1
    assert "config.model.width is 7: expected a multiple of its 6 heads" in ran.stderr


@pytest.mark.slow
def test_measures_what_ranking_costs(tmp_path):
    file = tmp_path / "found.json"
    arguments = ("--batch", "2", "--repeats", "2", *settings(TINY_DEIT), "--json", str(file))
    ran = run(*arguments, script=ROOT / "benchmarks" / "ranking.py")
    assert ran.returncode == 0, ran.stderr
    assert "with ranking" in ran.stdout
    found = json.loads(file.read_text())
    assert len(found["rounds"]["every second image"]["seconds"]) == 2
    assert found["seconds"]["every image"]["ratio"] > 0
    assert set(found["temporary_bytes_by_keys"]) == {"49", "98", "197", "394"}
