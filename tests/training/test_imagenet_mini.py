"""A rehearsal of ImageNet: tars made, prepared, trained on with both recipes, killed and resumed."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from bvit_jax import cli
from bvit_jax.data import mini_imagenet
from bvit_jax.data.prepare.__main__ import main as prepare
from bvit_jax.models import model_config
from configs import imagenet_mini
from tests.inprocess import Trained, at_events
from tests.processes import metrics_of

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


def config_of(variant: str, data_dir: Path) -> ConfigDict:
    """Returns two epochs of five steps of a smaller model; checkpoints come in the middle of an epoch."""
    config = imagenet_mini.get_config(variant)
    stages = {"width": (16,), "depth": (1,), "num_heads": (1,), "mlp_dim": (32,), "reduction": (2,)}
    sizes = {"width": 24, "depth": 1} if variant else {**stages, "patch_size": 16}
    config.model = model_config(**{**config.model.to_dict(), **sizes})
    config.batch_size = 200
    config.data.data_dir, config.data.crop_interpolation = str(data_dir), "random"
    config.epochs, config.eval_every_epochs, config.log_every_steps = 2, 1, 2
    config.checkpoint.every_steps, config.optim.warmup_epochs = 3, 0
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Trained:
    """An unbroken run with the whole recipe of DeiT."""
    return Trained(config_of("teacher", data_dir), tmp_path_factory.mktemp("runs") / "teacher")


def test_the_recipe_of_deit_continues_bit_for_bit(
    teacher: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(name: str, number: int) -> None:
        if number == 4:  # after the line of step 4
            raise Killed

    with monkeypatch.context() as patch:
        at_events(patch, kill, ("log",))
        with pytest.raises(Killed):
            teacher.train(tmp_path / "run")
    teacher.assert_continues(tmp_path / "run")
    assert teacher.printed["images"] == 100
    config = json.loads((teacher.workdir / "config.json").read_text())
    assert config["mix"]["mixup_alpha"] == 0.8
    assert config["erase"]["prob"] == 0.25
    assert config["data"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert config["data"]["repeats"] == 3
    assert config["data"]["crop_interpolation"] == "random"  # which that of DeiT on ImageNet lacks


def test_its_teacher_is_converted_and_distilled(teacher: Trained, data_dir: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(teacher.workdir), str(tmp_path / "teacher")]) == 0
    config = config_of("", data_dir)
    config.teacher.path, config.epochs = str(tmp_path / "teacher"), 1
    run = Trained(config, tmp_path / "run")
    lines = [line for line in metrics_of(run.workdir) if "loss" in line]
    assert all(line["bad_images"] == 0 for line in lines)
    assert lines[-1]["epoch"] == 1
