"""The benchmark of inference: a tiny run in this process, what it says of a run, and what it refuses."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from benchmarks import inference, inference_measure, inference_sides, inference_table
from benchmarks.inference_sides import COMPILED, DEIT, FLOAT, REFERENCE, XLA
from bvit_jax.inference.engine import families
from tests.benchmarks.test_benchmarks import Here, fails_with

TINY = {
    "image_size": 32,
    "num_classes": 10,
    "width": (32,),
    "depth": (1,),
    "num_heads": (1,),
    "mlp_dim": (64,),
    "reduction": (2,),
}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs all but the starts in this process, which stays on its cores and keeps its cache."""
    monkeypatch.setattr(inference_measure, "Worker", Here)
    monkeypatch.setattr(inference_measure, "elsewhere", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(inference_sides, "place", lambda subject: None)
    monkeypatch.setattr(families, "best", families.best)  # which a side replaces
    monkeypatch.setattr(inference, "TINY", TINY)
    monkeypatch.setattr("benchmarks.workload.forget_setup", lambda: None)
    monkeypatch.setattr("benchmarks.ceilings.ROUND_SECONDS", 0.01)
    cached = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", cached)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_measures_a_tiny_network(tmp_path, capsys):
    file = tmp_path / "found.json"
    arguments = ["--quick", "--sides", f"{XLA},{REFERENCE}", "--batch", "1,6", "--at-once", "4"]
    assert inference.main([*arguments, "--json", str(file)]) == 0
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    assert list(found["left_out"]) == [REFERENCE]
    assert [(run["batch"], run["sides"][XLA]["mode"]) for run in found["runs"]] == [
        (1, "1 at once"),
        (6, "3 at once"),
    ]
    for run in found["runs"]:
        side = run["sides"][XLA]
        operations = 2 * run["batch"] * found["model"]["binary_macs"]
        ceiling = max(max(rounds) for rounds in found["ceilings"]["1"].values())
        assert side["share_of_floor"] == pytest.approx(operations / ceiling / min(side["seconds"]))
        assert len(side["seconds"]) == 2
    start = found["starts"][XLA]
    for stages in (start["cold"], *start["warm"]):
        assert [stage["stage"] for stage in stages] == list(inference_table.STAGES)
        for name in ("seconds", "resident"):
            assert stages[0][name] < stages[2][name] < stages[-1][name]
        assert stages[-1]["peak"] >= stages[-1]["resident"]
    assert "| packed, XLA's operations | 3 at once |" in out
    assert "reached: peak of memory" in out


def report(seconds: dict[str, list[float]], unit: str = "avx512") -> dict[str, Any]:
    """Returns the parts of a report that aims are taken from."""
    sides = {side: {"seconds": rounds} for side, rounds in seconds.items()}
    start = [{"seconds": 2.5, "peak": 390e6, "stage": "first image", "resident": 380e6}]
    return {
        "vector_units": {"bvit_kernels": unit},
        "runs": [{"threads": 1, "batch": 1, "sides": sides}],
        "starts": {COMPILED: {"cold": start, "warm": [start, start]}},
    }


def test_says_which_aims_are_reached():
    seconds = {COMPILED: [0.03, 0.02], FLOAT: [0.1, 0.1], REFERENCE: [0.25, 0.3], DEIT: [0.05, 0.06]}
    assert list(map(str, inference_table.aims(report(seconds)))) == [
        "missed: throughput with 1 thread 12.50 times BinaryViT (PyTorch), eager; aim: at least 15 times",
        "missed: throughput with 1 thread 2.50 times DeiT-S (PyTorch), float32; aim: at least 3 times",
        "reached: one image with 1 thread 20.0 ms; aim: at most 25.0 ms",
        "reached: peak of memory 390 MB; aim: at most 400 MB",
        "reached: first answer with a warm cache 2.50 s; aim: at most 3.00 s",
    ]
    of_avx2 = list(inference_table.aims(report(seconds, "avx2")))
    assert of_avx2[0].reached
    assert of_avx2[2].bound == 60e-3


def test_ratios_are_those_of_the_best_rounds_and_the_median_of_all():
    assert inference_table.ratio([2.0, 1.0, 4.0], [8.0, 6.0, 4.0]) == "4.00 (4.00)"
    assert inference_table.ratio([2.0, 1.0, 4.0], [8.0, 6.0, 6.0]) == "6.00 (4.00)"


def test_caps_the_vector_unit_of_all_sides_and_takes_it_back(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--before")
    monkeypatch.delenv("BVIT_KERNELS", raising=False)
    with inference_sides.on_cpu("avx2"):
        environment = dict(inference_sides.os.environ)
    assert environment["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX2 --before"
    assert (environment["BVIT_KERNELS"], environment["ATEN_CPU_CAPABILITY"]) == ("avx2", "avx2")
    assert inference_sides.os.environ["XLA_FLAGS"] == "--before"
    assert "BVIT_KERNELS" not in inference_sides.os.environ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sides", "compile"], "--sides has 'compile'; did you mean 'compiled'?"),
        (["--batch", "1,x"], "--batch has 'x'; expected integers of at least 1"),
        (["--threads", "4096"], "--threads is 4096; expected at most "),
        (["--reference", "nowhere"], "--reference is nowhere: there is no models.py"),
        (["--json", "nowhere/x.json"], "--json is nowhere/x.json"),
        (["--sides", "reference", "--threads", "1"], "no side can run: reference: there is no --reference"),
    ],
)
def test_says_what_is_wrong_in_one_line(capsys, arguments, message):
    assert fails_with(inference.main, capsys, *arguments).startswith(f"error: {message}")
