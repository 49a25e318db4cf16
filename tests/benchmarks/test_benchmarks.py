"""The benchmarks of the step: a tiny run of each, and what they say when something is wrong.

One run has processes of its own. In the others the sides live in this process, and that of bvit_jax has the
facts of its model but computes nothing.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import augmentation, jax_side, measure, overhead, ranking, roofline, train_step, workload
from benchmarks.workload import Compilation, Facts, Kind, Memory, Plan
from bvit_jax.models import create_model
from tests.processes import environment

ROOT = Path(__file__).parents[2]
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


def settings(values: dict[str, str]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def make_checkout(path: Path, extra_parameters: int = 0) -> Path:
    configs = path / "configs" / "deit-small-patch16-224"
    configs.mkdir(parents=True)
    (path / "models.py").write_text(MODELS_PY)
    values = {"hidden_act": "gelu", "extra": extra_parameters}
    (configs / "config.json").write_text(json.dumps(values))
    return path


class Here:
    """A `workload.Worker` in this process."""

    def __init__(self, title: str, start: workload.StartSide, plan: Plan, context: Any = None) -> None:
        self._side, self._kinds = start(plan, context), plan.kinds
        self.facts, self.finished = self._side.facts, False

    def prepare(self) -> Compilation:
        return workload.prepare(self._side, self._kinds)[0]

    def seconds(self, kind: Kind, steps: int) -> float:
        seconds = workload.seconds_of(self._side, kind, steps)
        assert seconds is not None
        return seconds

    def first_step(self, kind: Kind) -> float | None:
        return workload.seconds_of(self._side, kind, 0)

    def finish(self) -> Memory:
        self.finished = True
        return self._side.memory()


class IdleSide:
    """The facts of a model of bvit_jax, and steps that do nothing."""

    def __init__(self, plan: Plan) -> None:
        values, dtype = jax_side.model_of(plan)
        model: Any = create_model(values, dtype)
        images = np.zeros((1, model.image_size, model.image_size, 3), np.float32)
        params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        self.facts = Facts(
            version=jax.__version__,
            device="1 x cpu",
            dtype=dtype,
            mode="",
            settings={"name": values["name"], **jax_side.settings_of(model)},
            parameters=jax_side.num_params(params),
        )

    def compile(self) -> Compilation:
        return Compilation()

    def step(self, kind: Kind) -> None:
        pass

    def first_step(self, kind: Kind) -> float | None:
        return 0.5

    def memory(self) -> Memory:
        return Memory(2**20, "process")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets `train_step` measure in this process, with an idle side in place of bvit_jax's."""
    monkeypatch.setattr(measure, "Worker", Here)
    monkeypatch.setattr(measure, "_start_jax", lambda plan, context: IdleSide(plan))
    monkeypatch.setattr(workload, "forget_setup", lambda: None)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:  # of the checkout, and stand-ins, which have no file
        module = sys.modules[name]
        stands_in = name.split(".")[0] in ("timm", "transformers") and module.__spec__ is None
        if name == "models" or stands_in:
            del sys.modules[name]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the benchmarks from changing this process for good."""
    monkeypatch.setattr(jax_side, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(jax_side, "_use_cache", lambda directory: None)
    monkeypatch.setattr(jax.monitoring, "register_event_listener", lambda listener: None)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns what `train_step` says in one line."""
    return fails_with(train_step.main, capsys, *arguments)


def fails_with(
    main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """Returns what a command says in one line."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


@pytest.mark.slow
def test_measures_in_processes_of_its_own(tmp_path):
    file, picture = tmp_path / "found.json", tmp_path / "roofline.png"
    command = ["-m", "benchmarks.train_step", "--model", "binaryvit", "--batch", "4", *QUICK]
    command += ["--kinds", "evaluation,training"]
    ran = subprocess.run(
        [sys.executable, *command, "--ceilings-scale", "0.0001", *settings(TINY), "--json", str(file)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr
    assert "training, images/s" in ran.stdout
    assert "floor (share reached)" in ran.stdout
    found = json.loads(file.read_text())
    assert found["command"].startswith("python -m benchmarks.train_step --model binaryvit")
    (measured,) = found["runs"]
    side = measured["sides"]["bvit_jax"]
    assert list(measured["sides"]) == ["bvit_jax"]
    assert side["settings"]["width"] == [8]
    assert side["parameters"] > 1000
    for kind in ("evaluation", "training"):
        assert len(side["images_per_second"][kind]) == 2
        assert min(side["images_per_second"][kind]) > 0
        assert side["cached_first_step_seconds"][kind] > 0
        assert side["compiler_flops"][kind] > 0
        assert side["accessed_bytes"][kind] > 0
        assert 0 < side["achieved"][kind]["share_of_floor"] < 1
    assert side["cached_first_step_seconds"]["training"] < side["compile_seconds"]["training"]
    assert side["memory"]["peak"] > 2**20
    assert len(found["ceilings"]["bytes_per_second"]["read"]) == 6  # three rounds before, and three after
    assert roofline.main([str(file), "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_measures_the_reference_in_turn(tmp_path, capsys):
    pytest.importorskip("torch")
    checkout = make_checkout(tmp_path / "checkout")
    file = tmp_path / "found.json"
    status = train_step.main(
        [
            *("--model", "deit_small", "--batch", "2,3", *QUICK, "--kinds", "training", *settings(TINY_DEIT)),
            *("--dtype", "bfloat16", "--reference", str(checkout), "--json", str(file)),
        ]
    )
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "building" not in out
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
        assert f"(best {best:.2f})" in out


@pytest.mark.usefixtures("here")
def test_refuses_another_model_than_ours(tmp_path, capsys):
    pytest.importorskip("torch")
    checkout = make_checkout(tmp_path / "checkout", extra_parameters=7)
    arguments = ("--model", "deit_small", "--batch", "2", *QUICK, *settings(TINY_DEIT))
    message = fails(capsys, *arguments, "--reference", str(checkout))
    assert message.startswith("error: the two models differ: ")


@pytest.mark.usefixtures("here")
def test_goes_on_where_torch_cannot_compile(capsys):
    pytest.importorskip("torch")
    from benchmarks import torch_side

    class NoCompiler(torch_side.TorchSide):
        def __init__(self):
            self._kinds, self._is_compiled, self.facts = ("forward",), True, None

        def memory(self):
            return Memory(0, "process")

        def step(self, kind):
            raise RuntimeError("No working C++ compiler found\nand twenty more lines")

    plan = Plan(None, None, {}, 2, None, None, True, kinds=("forward",))
    deit = Plan("deit_small", None, {}, 2, None, None, False)
    failing = Here("", lambda plan, context: NoCompiler(), plan)
    workers = {"reference": Here("", lambda plan, context: IdleSide(plan), deit)}
    workers["reference compiled"] = failing
    compilation, left_out = measure.prepare_workers(workers)
    reason = "torch.compile failed in the forward step: No working C++ compiler found"
    assert left_out == {"reference compiled": reason}
    assert capsys.readouterr().err == f"reference compiled is left out: {reason}\n"
    assert list(workers) == list(compilation) == ["reference"]
    assert failing.finished
    with pytest.raises(workload.UserError, match=r"torch\.compile failed"):
        measure.prepare_workers({"reference": failing})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "binaryvt"], "--model is 'binaryvt'; did you mean 'binaryvit'?"),
        (["--model", "binaryvit", "--set", "width"], "--set is 'width'; expected KEY=VALUE"),
        (["--model", "binaryvit", "--set", "wdth=3"], "config.model.wdth is not a setting"),
        (["--model", "binaryvit", "--reference", "nowhere"], "--reference is nowhere: there is no"),
        (["--model", "binaryvit", "--compile"], "--compile is for the reference"),
        (["--model", "binaryvit", "--batch", "4,x"], "--batch has 'x'; expected integers of at least 1"),
        (["--model", "binaryvit", "--batch", "0"], "--batch has '0'; expected integers of at least 1"),
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
@pytest.mark.usefixtures("here")
def test_says_what_is_wrong_in_one_line(capsys, arguments, message):
    assert fails(capsys, "--batch", "2", "--ceilings-scale", "0", *arguments).startswith(f"error: {message}")


def test_says_that_torch_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checkout = make_checkout(tmp_path / "checkout")
    message = fails(capsys, "--model", "binaryvit", "--batch", "2", "--reference", str(checkout))
    assert message.startswith("error: --reference needs torch")


def test_stands_in_for_the_outputs_of_transformers():
    pytest.importorskip("torch")
    from benchmarks.torch_side import Output

    output = Output(last_hidden_state=1, hidden_states=None)
    assert output.attentions is None
    assert (output[0], output[1:]) == (1, ())


@pytest.mark.usefixtures("here")
def test_reads_a_config_file(tmp_path, capsys):
    config = tmp_path / "experiment.py"
    config.write_text(
        "from bvit_jax.config import default_config\n"
        "from bvit_jax.models import model_config\n"
        "def get_config(argument):\n"
        "    config = default_config()\n"
        "    config.model = model_config('deit', depth=1, mlp_dim=int(argument))\n"
        "    return config\n"
    )
    arguments = ("--config", f"{config}:32", "--batch", "2", "--ceilings-scale", "0", "--set", "width=7")
    assert "config.model.width is 7: expected a multiple of its 6 heads" in fails(capsys, *arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_measures_augmentation(capsys):
    arguments = ("--model", "deit_small", "--batch", "8", "--repeats", "1", *settings(TINY_DEIT))
    assert augmentation.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("deit_small: step ")
    assert out.endswith(" % of the step\n")


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_measures_metrics_and_checkpoints(tmp_path, capsys):
    file = tmp_path / "found.json"
    flags = ("--model", "binaryvit", "--batch", "8", "--steps", "2", "--repeats", "2", "--log-every", "4")
    assert overhead.main([*flags, *settings(TINY), "--json", str(file), "--dir", str(tmp_path)]) == 0
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    for event, every in (("log", 4), ("checkpoint", 1281167 // 8)):
        share = found[event]["seconds"] / found["step_seconds"] / every
        assert found[event]["share"] == pytest.approx(share)
        low, high = found[event]["rounds_ratio_range"]
        assert 0 < low <= found[event]["rounds_ratio"] <= high
        assert f"{event} " in out


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_measures_what_ranking_costs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ranking, "KEYS", (5, 9))
    file = tmp_path / "found.json"
    assert ranking.main(["--batch", "8", "--repeats", "2", *settings(TINY_DEIT), "--json", str(file)]) == 0
    assert "with ranking" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert len(found["rounds"]["every second image"]["seconds"]) == 2
    assert found["seconds"]["every image"]["ratio"] > 0
    assert set(found["temporary_bytes_by_keys"]) == {"5", "9"}
