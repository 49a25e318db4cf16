"""Evaluations of a model on other data sets than its own."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from bvit_jax import cli, data
from bvit_jax.data.prepare import prepare
from bvit_jax.data.prepare.imagefolder import imagefolder_source
from bvit_jax.errors import UserError
from bvit_jax.inference.evaluation import evaluate_model
from bvit_jax.training.evaluation import evaluate_workdir
from configs import deit_digits
from tests.weights.test_convert import make_run

TEACHER = Path(str(resources.files("bvit_jax") / "assets" / "deit_digits"))
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, and some of them in folders: all under words, and three under their own names."""
    directory = tmp_path_factory.mktemp("tfds")
    test = data.open_split("digits", str(directory), "test")
    for name, names in (("words", WORDS), ("three", {3: "3", 5: "5", 7: "7"})):
        for i in range(120):
            label = int(test.source[i]["label"])
            if name == "words" or label in names:
                path = directory / "folders" / name / "test" / names[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(test.source[i]["image"])
        prepare(imagefolder_source(name, directory / "folders" / name, directory))
    return directory


@pytest.mark.slow
def test_a_converted_model_on_a_data_set(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", f"--checkpoint={TEACHER}", "--config=deit_digits", f"--data_dir={data_dir}"]
    assert cli.main([*arguments, "--batch_size=120"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 360
    assert figures["top1"] > 0.95
    assert cli.main([*arguments, "--config.data.dataset=words"]) == 1
    message = "class 0 of the data set is 'eight' and of the model '0'"
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_subset_of_the_classes_has_their_logits(data_dir: Path) -> None:
    config = deit_digits.get_config()
    config.data.update(dataset="three", data_dir=str(data_dir), eval_split="test")
    config.eval_batch_size = 120
    with pytest.raises(UserError, match="the data set has 3 classes"):
        evaluate_model(TEACHER, config)
    figures = evaluate_model(TEACHER, config, "subset")
    assert figures == evaluate_model(TEACHER, config, "numbers")
    assert figures["top1"] > 0.95
    assert figures["top5"] == 1  # of three
    assert np.isfinite(figures["loss"])


def test_a_run_of_an_older_version_is_evaluated_as_it_was(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = deit_digits.get_config()
    config.model.update(depth=1, width=16, mlp_dim=16, num_heads=1)
    config.eval_batch_size = 120
    config.data.update(data_dir=str(data_dir), eval_resize=24)  # of 32
    make_run(tmp_path / "run", config)
    assert evaluate_workdir(tmp_path / "run", "latest", {})["images"] == 360
    [warning] = [message for message in caplog.messages if "borders" in message]
    assert "config.data.eval_resize is 24; expected at least config.model.image_size, 32" in warning


@pytest.mark.slow
def test_no_image_of_an_evaluation_can_be_decoded(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(encoded: bytes) -> None:
        raise data.images.ImageError("it is damaged")

    config = deit_digits.get_config()
    config.data.update(dataset="three", data_dir=str(data_dir), eval_split="test", max_bad_images=999)
    config.eval_batch_size = 120
    monkeypatch.setattr(data.images, "decode", fails)
    with pytest.raises(UserError, match=r"none of the .* images of the evaluation can be decoded"):
        evaluate_model(TEACHER, config, "subset")
