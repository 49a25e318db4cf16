"""The command line: what each command refuses, in one line and in this process."""

import json
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import pytest
from absl import flags
from PIL import Image

import bvit_jax
from bvit_jax import cli
from bvit_jax.errors import Stopped, UserError
from bvit_jax.parity import command as parity
from bvit_jax.report import models as report_models
from bvit_jax.runtime import distributed, process
from bvit_jax.runtime.arguments import CONFIGS, parse_config
from bvit_jax.runtime.interruption import Interrupted
from tests.inprocess import Terminal
from tests.processes import ROOT, TIMEOUT, environment


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (
            ["xyz"],
            "no command 'xyz'; known: ablate, convert, eval, export, parity, plan, predict, prepare,"
            " report, train",
        ),
        (
            ["train", "--config=digtis"],
            "--config is 'digtis', which is no experiment; did you mean 'digits'?",
        ),
        (["train", "--config", "digtis"], "did you mean 'digits'?"),
        (["train", "--config=nowhere.py"], "cannot load nowhere.py"),
        (["train", "--config.modle.width=1"], "unknown key "),
        (["train", "--config.batch_size=x"], "--config.batch_size=x: invalid literal for int()"),
        (["train", "--nonsense"], "Unknown command line flag 'nonsense'"),
        (["train", "word"], "unexpected argument 'word'"),
        (["train"], "--workdir is missing"),
        (["train", "--dry_run", "--debug_nans"], "--debug_nans runs the steps that --dry_run leaves out"),
        (["train", "--topology=v5e:2x2"], "--topology=v5e:2x2 is for planning only; add --dry_run"),
        (["plan", "--workdir=/nowhere"], "Unknown command line flag 'workdir'"),
        (["eval"], "--workdir is missing"),
        (["eval", "--workdir=/nowhere"], "no config.json in /nowhere"),
        (["eval", "--checkpoint=newest"], "--checkpoint is 'newest'; expected latest or best, or --config"),
        (["eval", "--config=digits"], "with --config, name a model with --checkpoint"),
        (["eval", "--workdir=s3://bucket/run"], "s3://bucket/run is an address; expected a local path"),
        (["eval", "--workdir=gs://"], "gs:// is an address; expected a local path"),
        (["train", "--workdir=file:///run"], "file:///run is an address; expected a local path"),
        (["report", "cost", "--config=digtis"], "did you mean 'digits'?"),
        (["report", "curves", "/nowhere"], "cannot read /nowhere"),
        (["predict", "--checkpoint=/nowhere", "none.jpg"], "no file none.jpg"),
        (["predict", "--checkpoint=~/nowhere", str(ROOT / "README.md")], "/nowhere; expected a checkpoint"),
        (["convert", "~/nowhere.pth", "/nowhere/else"], f"no file or directory {Path.home()}/nowhere.pth"),
        (["convert", "/nowhere", "/nowhere/else"], "/nowhere"),
        (
            ["prepare", "imagefolder", "x", "--folder=/nowhere", "--data_dir=gs://a"],
            "gs://a is an address; expected a local path",
        ),
    ],
)
def test_mistakes_end_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, *arguments)


def test_convert_hears_signals_before_its_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bvit_jax.weights", None)  # cannot be imported
    monkeypatch.delitem(sys.modules, "bvit_jax.convert", raising=False)
    monkeypatch.setattr(cli, "run", lambda command: sys.exit(command))
    with pytest.raises(SystemExit, match="convert"):
        runpy.run_module("bvit_jax.convert", run_name="__main__")


@pytest.mark.parametrize("name", [*cli.COMMANDS, None])
def test_help(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"] if name else []) == 0
    out, err = capsys.readouterr()
    assert err == ""
    expected = {"train": "--[no]debug_nans", "eval": "--split", "plan": "--topology", None: "convert"}
    assert expected.get(name, f"usage: bvit {name}") in out


def test_version_says_what_a_report_of_a_bug_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_mine")
    assert cli.main(["--version"]) == 0
    first, python, cpu, packages, *variables = capsys.readouterr().out.splitlines()
    assert first == f"bvit_jax {bvit_jax.__version__}"
    assert python.startswith(f"Python {platform.python_version()}, ")
    assert re.search(r", \d+ cores, ", cpu)
    assert f"jax {jax.__version__}, " in packages
    assert "XLA_FLAGS=--xla_of_mine" in variables


def test_argparse_refuses_with_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert"]) == 2
    assert "the following arguments are required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a\nb"), 1, "error: a b\n"),
        (Interrupted(7), 128 + signal.SIGTERM, "stopped by SIGTERM at step 7; run the same command again"),
        (Stopped(signal.SIGHUP), 129, "stopped by SIGHUP; run the same command again\n"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT; run the same command again\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: No such file: x\n"),
        (OSError("odd"), 1, "error: odd\n"),
        (ValueError("RESOURCE_EXHAUSTED: 3 GB"), 1, "error: what the run computes does not fit"),
        (SystemExit(143), 143, ""),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_one_policy_for_errors(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(arguments: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fails", cli.Command("", fails))
    assert cli.main(["fails"]) == status
    assert capsys.readouterr().err.startswith(line)


def test_commands_show_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_models, "ROWS", report_models.ROWS[-1:])
    monkeypatch.chdir(ROOT)
    for arguments, shown in (
        (["convert", "bvit_jax/assets/deit_digits", str(tmp_path / "x")], "converting"),
        (["report", "table"], "models"),
    ):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            assert cli.main(arguments) == 0
        assert shown in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert parity._computed(iter([1, 2])) == [1, 2]
    assert "running the model" in terminal.getvalue()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "fails", cli.Command("", lambda arguments: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fails"])


@pytest.mark.parametrize(
    ("error", "line", "traceback"),
    [
        (ValueError("Gloo failed\nat"), "other processes of the run do not answer: Gloo failed;", False),
        (ValueError("no peer, no connection"), "no peer, no connection", True),
        (TypeError("Gloo"), "Gloo", True),
    ],
)
def test_errors_in_a_run_of_several_processes(
    error: Exception,
    line: str,
    traceback: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One that means that another process is gone is one line; any other keeps its traceback."""

    def fails(arguments: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fails", cli.Command("", fails))
    monkeypatch.setattr(distributed, "is_active", lambda: True)
    assert cli.main(["fails"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: {line}")
    assert (lines[0].startswith("Traceback"), len(lines) > 1) == (traceback, traceback)


@pytest.mark.slow
def test_main_leaves_the_process_alone(capsys: pytest.CaptureFixture[str]) -> None:
    handler, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    variables, defined = dict(os.environ), set(flags.FLAGS)
    for _ in range(2):
        assert cli.main(["report", "cost", "--config=digits", "--config.model.depth=(1,1)", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
        assert cli.main(["convert", "/nowhere", "/nowhere/else"]) == 1
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == (handler, hook)
    assert dict(os.environ) == variables
    assert set(flags.FLAGS) == defined
    assert not process.is_ours()
    assert jax.config.jax_platforms == "cpu"  # of the environment


EARLY = """
import importlib.abc, signal, sys
from bvit_jax.__main__ import console

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "absl":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
console()
"""


def test_ctrl_c_while_it_imports_leaves_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EARLY], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# Of a folder there must be one: tests/training/test_finetune.py.
@pytest.mark.parametrize("name", sorted({path.stem for path in CONFIGS.glob("[!_]*.py")} - {"finetune"}))
def test_experiments_are_found_by_name(name: str) -> None:
    by_name = parse_config([f"--config={name}", "--config.seed=3"])
    assert by_name.seed == 3
    assert by_name.to_json() == parse_config([f"--config={CONFIGS / name}.py", "--config.seed=3"]).to_json()


def test_experiments_take_an_argument() -> None:
    assert parse_config(["--config=deit_digits:distilled"]).model.distillation_token
    assert not parse_config(["--config=deit_digits"]).model.distillation_token


@pytest.mark.slow
def test_the_wheel_trains_in_an_empty_directory(tmp_path: Path) -> None:
    """Everything that a user needs is in it: commands, experiments, teachers."""
    checkout, unpacked, directory = tmp_path / "checkout", tmp_path / "unpacked", tmp_path / "empty"
    ignored = shutil.ignore_patterns(".git", "golden", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)  # building leaves files behind
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, f"--wheel-dir={tmp_path}", str(checkout)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
        (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert b"bvit = bvit_jax.__main__:console" in archive.read(entry)
    directory.mkdir()

    def bvit(*arguments: str) -> str:
        variables = {**environment(), "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", "from bvit_jax.__main__ import console; console()", *arguments]
        done = subprocess.run(
            command,
            cwd=directory,
            env=variables,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = [
        "--config.model.depth=(1,1)",
        "--config.epochs=1",
        "--config.health=False",
        "--config.data.data_dir=data",
        "--config.data.train_split=train[:128]",
        "--config.data.eval_split=test[:64]",
    ]
    trained = json.loads(bvit("train", "--config=digits", "--workdir=w", *small))
    assert json.loads(bvit("eval", "--workdir=w"))["top1"] == trained["top1"]
    Image.new("RGB", (8, 8)).save(directory / "x.png")
    assert len(json.loads(bvit("predict", "--checkpoint=w", "x.png", "--json"))["classes"]) == 5
