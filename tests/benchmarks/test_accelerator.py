"""The command for accelerators: its order, budget, failures and table, and a trial of its pieces on a CPU."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accelerator, stand_ins
from benchmarks.pieces import catalogue, numbers, process, real_run, summary
from benchmarks.pieces.piece import PARTS, Piece
from benchmarks.workload import MODELS
from bvit_jax.config import default_config
from bvit_jax.models import Execution
from tests.benchmarks.test_benchmarks import make_checkout
from tests.processes import environment

ROOT = Path(__file__).parents[2]
CPU = {"platform": "cpu", "seconds": 1.0}
GPU = {
    "platform": "gpu",
    "device": "NVIDIA H100",
    "devices": 1,
    "driver": "",
    "cpu": "a CPU",
    "cores": 16,
    "python": "3.12",
    "versions": {"jax": "0.12"},
    "commit": None,
    "seconds": 1.0,
}


def piece(name="one", part="numbers", seconds=1, needs=""):
    return Piece(part, name, seconds, "tests.benchmarks.bad_pieces:breaks", {"how": name}, needs=needs)


# --- one piece ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("well", None),
        ("raise", "ValueError: what is wrong"),
        ("exit", "ended with status 7"),
        ("abort", "ended by SIGABRT: F0000 unknown flag"),
        pytest.param("hang", "stopped after 3 s", marks=pytest.mark.slow),
    ],
)
def test_a_piece_keeps_what_it_found_however_it_ends(tmp_path, how, error):
    found = process.run(piece(how), 3 if how == "hang" else 60, tmp_path / "log")
    assert found["first"] == 1
    assert found.get("error") == error
    assert found["seconds"] > 0


def test_flags_are_added_to_those_that_are_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a")
    assert process._environment({"XLA_FLAGS": "--b"})["XLA_FLAGS"] == "--a --b"
    assert process._environment({"JAX_PLATFORMS": "cpu"})["XLA_FLAGS"] == "--a"


# --- all pieces --------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Returns a function that runs the command with stand-ins for the device and for some pieces."""

    def run(pieces, results, *arguments, device=GPU):
        seen = []

        def instead(piece, limit, log):
            seen.append((piece.name, limit))
            found = device if piece is catalogue.DEVICE else results[piece.name]
            return {"seconds": 1.0, **found}

        monkeypatch.setattr(process, "run", instead)
        monkeypatch.setattr(catalogue, "pieces", lambda reference: pieces)
        status = accelerator.main(["--json", str(tmp_path / "found.json"), *arguments])
        return status, [name for name, _ in seen[1:]]

    return run


def test_runs_what_fits_and_says_why_the_rest_does_not(run, tmp_path, capsys):
    pieces = [piece("long", seconds=900), piece("alone", needs="reference"), piece("short")]
    assert run(pieces, {"short": {"int8": {"8x8x8": {"exact": True, "operations_per_second": 1e12}}}}) == (
        0,
        ["short"],
    )
    found = {p["name"]: p for p in json.loads((tmp_path / "found.json").read_text())["pieces"]}
    assert {name: p["status"] for name, p in found.items()} == {
        "long": "skipped",
        "alone": "skipped",
        "short": "done",
    }
    assert found["long"]["error"] == "480 s are left, --minutes"
    assert found["alone"]["error"] == "needs the PyTorch code: add --reference CHECKOUT, and torch"
    assert "skipped: needs the PyTorch code" in capsys.readouterr().out


def test_goes_on_after_a_failure_and_fails_in_the_end(run, tmp_path):
    pieces = [piece("bad"), piece("good")]
    results = {"bad": {"error": "what is wrong", "first": 1}, "good": {}}
    assert run(pieces, results) == (1, ["bad", "good"])
    bad, good = json.loads((tmp_path / "found.json").read_text())["pieces"]
    assert (bad["status"], bad["error"], bad["found"]) == ("failed", "what is wrong", {"first": 1})
    assert good["status"] == "done"


def test_a_batch_that_is_too_large_is_no_failure(run):
    assert run([piece()], {"one": {"error": "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"}})[0] == 0


def test_goes_on_from_an_earlier_report(run, tmp_path, capsys):
    pieces = [piece("bad"), piece("good"), piece("other", "feed")]
    results = {"bad": {"error": "what is wrong"}, "good": {}, "other": {}}
    run(pieces, results, "--parts", "numbers")
    known = (tmp_path / "found.json").rename(tmp_path / "known.json")
    assert run(pieces, {**results, "bad": {}}, "--known", str(known)) == (0, ["bad", "other"])
    assert len(json.loads((tmp_path / "found.json").read_text())["pieces"]) == 3
    capsys.readouterr()
    other = {**GPU, "device": "NVIDIA H200"}
    assert run(pieces, results, "--known", str(known), device=other)[0] == 1
    assert "of another device: NVIDIA H100" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["passed", "same_weights"])
def test_fails_where_a_number_is_another(run, name):
    found = {"a": {"passed": False, "rows": [], "error": "x"}} if name == "passed" else {}
    found |= {"top1": 0.9, "same_metrics": True, name: False} if name == "same_weights" else {}
    assert run([piece()], {"one": found}) == (1, ["one"])


def test_chooses_parts(run):
    pieces = [piece(part, part) for part in PARTS]
    assert run(pieces, {part: {} for part in PARTS}, "--parts", "feed, speed")[1] == ["speed", "feed"]


@pytest.mark.parametrize(
    ("arguments", "device", "message"),
    [
        (["--parts", "sped"], GPU, "error: --parts has 'sped'; did you mean 'speed'?"),
        (["--reference", "nowhere"], GPU, "error: --reference is nowhere: there is no models.py"),
        ([], CPU, "error: no accelerator: jax sees none"),
        ([], {"error": "broken driver"}, "error: no accelerator: broken driver; --quick"),
    ],
)
def test_says_what_is_wrong_in_one_line(run, capsys, arguments, device, message):
    assert run([piece()], {"one": {}}, *arguments, device=device)[0] == 1
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


# --- the pieces that there are -----------------------------------------------------------------


@pytest.mark.parametrize("pieces", [catalogue.pieces(""), catalogue.quick_pieces("")], ids=["full", "quick"])
def test_every_piece_can_be_called(pieces):
    assert len({(p.part, p.name) for p in pieces}) == len(pieces)
    for p in (catalogue.DEVICE, *pieces):
        module, _, name = p.call.partition(":")
        inspect.signature(getattr(importlib.import_module(module), name)).bind(**p.arguments)
        assert p.part in {*PARTS, "device"}
        assert p.needs in {"", *catalogue.NEEDS}
        json.dumps(p.arguments)
        assert p.arguments.get("model", "binaryvit") in MODELS
        Execution(**p.arguments.get("execution", {}))
        for file in (*p.arguments.get("files", ()), *filter(None, [p.arguments.get("file")])):
            assert (numbers.GOLDEN / f"{file}.npz").exists()


def test_the_most_valuable_pieces_come_first_and_fit_into_the_budget():
    assert {p.part for p in catalogue.pieces("")} == set(PARTS)
    first = catalogue.pieces("")[:5]
    assert {p.part for p in first} == {"numbers", "speed"}
    assert catalogue.DEVICE.seconds + sum(p.seconds for p in first) < 8 * 60


@pytest.mark.slow
def test_xla_knows_the_flags():
    flags = [p.environment.get("XLA_FLAGS", "") for p in catalogue.pieces("")]
    flags = " ".join([*flags, real_run.DETERMINISTIC])
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, check=True)


def test_stands_in_for_what_is_missing(monkeypatch):
    monkeypatch.setattr(stand_ins.importlib.util, "find_spec", lambda name: None)
    for name in ("ml_collections", "jaxtyping"):
        monkeypatch.delitem(sys.modules, name)
    stand_ins.provide()
    module, annotations = sys.modules["ml_collections"], sys.modules["jaxtyping"]
    assert annotations.Float[int, "batch"] is int
    assert annotations.PyTree[int] is Any
    config = module.ConfigDict({"a": {"b": 1}})
    config.update({"c": {"d": module.FieldReference("auto", field_type=object)}})
    config.a.e = 2
    assert (config.a.b, config["a"]["e"], config.c.d) == (1, 2, "auto")
    assert not hasattr(config, "nothing")
    assert default_config().optim.b1 == 0.9


# What neither jax, flax, optax, orbax-checkpoint, torch nor transformers brings along.
MISSING = (
    *("ml_collections", "jaxtyping", "tensorflow_datasets", "grain", "array_record", "google_crc32c"),
    *("sklearn", "PIL", "matplotlib", "tensorboardX"),
)
# Python runs it at its start.
SITE = f"""
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {MISSING} else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


@pytest.mark.slow
def test_a_quick_pass_where_only_the_packages_of_the_steps_are(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    file = tmp_path / "found.json"
    command = ["benchmarks/accelerator.py", "--quick", "--parts", "numbers,speed,levers", "--json", str(file)]
    ran = subprocess.run(
        [sys.executable, *command, "--reference", str(make_checkout(tmp_path / "checkout"))],
        env={**environment(), "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stdout + file.with_suffix(".log").read_text()
    found = {p["name"]: p for p in json.loads(file.read_text())["pieces"]}
    assert {p["status"] for p in found.values()} == {"done"}
    assert found["golden files"]["found"]["deit"]["passed"]
    flips = found["narrow types: react_deit"]["found"]
    assert 0 <= flips["highest"]["float32"]["mean"] < flips["highest"]["bfloat16"]["mean"] < 0.5
    side = found["binaryvit bfloat16, batch 4"]["found"]
    assert side["achieved"]["training"]["share_of_floor"] > 0
    assert side["memory"]["peak"] > 0
    theirs = found["deit_small PyTorch eager, batch 2"]["found"]
    assert theirs["parameters"] == found["deit_small float32, batch 2"]["found"]["parameters"]
    assert theirs["achieved"]["training"]["share_of_floor"] > 0


@pytest.mark.slow
def test_the_script_passes_its_options_on():
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "accelerator.sh"), "--help"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "--parts A,B" in ran.stdout


# --- the table ---------------------------------------------------------------------------------


def side(name, speed, peak, work=True):
    return {
        "part": "speed",
        "name": name,
        "status": "done",
        "estimate": 10,
        "seconds": 9.0,
        "found": {
            "batch": 10,
            "dtype": "bfloat16",
            "devices": 1,
            "settings": {"name": "binaryvit", "image_size": 224},
            "work": dict.fromkeys(
                ("binary_macs", "real_macs", "elements", "variable_bytes", "state_bytes"), 1000
            )
            if work
            else None,
            "images_per_second": {"training": [speed, speed]},
            "memory": {"peak": peak, "of": "device", "setup_peak": 0},
            "compile_seconds": {"training": 12.0} if work else {},
            "accessed_bytes": {},
        },
    }


def test_compares_each_side_at_its_best_batch_with_the_aims():
    rates = {"operations_per_second": {"bfloat16": [1e6], "float32": [1e6]}, "bytes_per_second": {"a": [1e7]}}
    pieces = [
        {"part": "speed", "name": "ceilings", "status": "done", "estimate": 1, "seconds": 1, "found": rates},
        side("binaryvit bfloat16, batch 10", 50.0, 2**30),
        side("binaryvit float32, batch 10", 40.0, 2**30),
        side("binaryvit PyTorch eager, batch 10", 10.0, 2**32, work=False),
        side("binaryvit PyTorch compiled, batch 10", 45.0, 2**32, work=False),
        side("binaryvit PyTorch eager, float32, batch 10", 99.0, 1, work=False),
    ]
    summary.add_floors(pieces)
    assert all("share_of_floor" in p["found"]["achieved"]["training"] for p in pieces[1:])
    text = summary.table({"device": GPU, "pieces": pieces})
    eager, compiled, memory = (
        next(line for line in text.splitlines() if line.startswith(f"  {words}"))
        for words in ("faster than eager", "faster than torch.compile", "less peak memory")
    )
    assert "5.00 of 3.0   reached" in eager
    assert "1.11 of 1.3   MISSED" in compiled
    assert "4.00 of 3.0   reached" in memory
    assert "training 50 images/s, 102 MiB an image" in text
