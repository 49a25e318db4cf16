"""A rehearsal of ImageNet: tars made, prepared, trained on with both recipes, killed and resumed."""

import json
from pathlib import Path

import pytest

from bvit_jax import cli
from bvit_jax.data import mini_imagenet
from bvit_jax.data.prepare.__main__ import main as prepare
from tests.processes import ROOT, assert_same_runs, metrics_of, run, run_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data set: an image of each class to train on, 100 to evaluate."""
    directory = tmp_path_factory.mktemp("imagenet")
    tars = str(directory / "tars")
    assert mini_imagenet.main(["--out", tars, "--train_per_class", "1", "--validation", "100"]) == 0
    counts = ["--expect", "train=1000,validation=100"]
    assert prepare(["imagenet2012", "--tars", tars, *counts, "--data_dir", str(directory / "tfds")]) == 0
    return directory / "tfds"


def flags_of(variant: str, workdir: Path, data_dir: Path, *more: str) -> list[str]:
    """Two epochs of ten steps; checkpoints come in the middle of an epoch."""
    return [
        f"--config={ROOT}/configs/imagenet_mini.py{variant}",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        "--config.epochs=2",
        "--config.eval_every_epochs=1",
        "--config.log_every_steps=2",
        "--config.checkpoint.every_steps=3",
        "--config.optim.warmup_epochs=0",
        *more,
    ]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The workdir of an unbroken run with the whole recipe of DeiT."""
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    result = run("train.py", *flags_of(":teacher", workdir, data_dir))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["images"] == 100
    return workdir


def test_the_recipe_of_deit_continues_bit_for_bit(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    flags = flags_of(":teacher", tmp_path / "run", data_dir)
    run_until("step 8/20", *flags)
    assert run("train.py", *flags).returncode == 0
    assert_same_runs(tmp_path / "run", teacher)
    config = json.loads((teacher / "config.json").read_text())
    assert config["mix"]["mixup_alpha"] == 0.8
    assert config["erase"]["prob"] == 0.25
    assert config["data"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert config["data"]["repeats"] == 3


def test_its_teacher_is_converted_and_distilled(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(teacher), str(tmp_path / "teacher")]) == 0
    path = f"--config.teacher.path={tmp_path / 'teacher'}"
    result = run("train.py", *flags_of("", tmp_path / "run", data_dir, path, "--config.epochs=1"))
    assert result.returncode == 0, result.stderr
    lines = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert all(line["bad_images"] == 0 for line in lines)
    assert lines[-1]["epoch"] == 1
