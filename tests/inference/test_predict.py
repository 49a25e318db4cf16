"""The predict command: photographs and digits, from workdirs and converted checkpoints."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from bvit_jax import cli, models, weights
from bvit_jax.augment.normalization import Normalization
from bvit_jax.errors import UserError
from bvit_jax.inference import Classifier
from bvit_jax.inference.images import model_input
from bvit_jax.weights import tensor_files
from bvit_jax.weights.preprocessing import Preprocessing, deit_preprocessing
from bvit_jax.workdir import runs
from configs import digits
from tests.tiny_models import random_variables, tiny_pretrained
from tests.weights.test_convert import make_run

TEACHER = Path(str(resources.files("bvit_jax") / "assets" / "deit_digits"))


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A real photograph, 640×427 pixels."""
    path = tmp_path_factory.mktemp("images") / "flower.jpg"
    Image.fromarray(load_sample_image("flower.jpg")).save(path, quality=95)
    return path


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory):
    """Files of held-out digits, each named after what it shows."""
    directory, bunch = tmp_path_factory.mktemp("digits"), load_digits()
    paths = []
    for digit in range(10):
        index = next(i for i in range(0, len(bunch.target), 5) if bunch.target[i] == digit)
        pixels = np.round(bunch.images[index] * (255 / 16)).astype(np.uint8)
        paths.append(directory / f"{digit}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def main(arguments: list[str]) -> int:
    return cli.main(["predict", *arguments])


def error_of(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.slow
def test_the_teacher_reads_digits(digit_files, capsys):
    arguments = ["--checkpoint", TEACHER, "--json", "--top=3", *digit_files]
    assert main([str(argument) for argument in arguments]) == 0
    for path, line in zip(digit_files, capsys.readouterr().out.splitlines(), strict=True):
        answer = json.loads(line)
        assert answer["image"] == str(path)
        assert len(answer["classes"]) == 3
        assert answer["classes"][0]["name"] == path.stem
        assert answer["classes"][0]["probability"] > 0.5


@pytest.mark.slow
def test_what_is_printed(digit_files, capsys, caplog):
    with caplog.at_level("INFO"):
        assert main(["--checkpoint", str(TEACHER), str(digit_files[7]), str(digit_files[3])]) == 0
    assert "compiling the model: 1 done" in caplog.messages
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert (lines[0], lines[6]) == (str(digit_files[7]), str(digit_files[3]))
    assert lines[1].endswith(" %  7")
    assert lines[7].endswith(" %  3")


@pytest.mark.slow
def test_a_photograph_from_a_converted_checkpoint(tmp_path, photograph, capsys):
    """Of all ImageNet's classes, in the command's own process, as a user runs it."""
    config = models.model_config("deit", width=64, depth=1, num_heads=1, mlp_dim=64)
    model = models.create_model(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 224, 224, 3)))
    variables = random_variables(abstract)
    source = weights.Pretrained(
        config, variables, deit_preprocessing(224), tuple(f"{i}" for i in range(1000))
    )
    state, _ = weights.to_format(source, "timm")
    path = tmp_path / "deit.safetensors"
    path.write_bytes(tensor_files.encode_safetensors(state, {}))
    for arguments in (
        ["convert", path, tmp_path / "x"],
        ["predict", "--checkpoint", tmp_path / "x", photograph, "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"bvit_jax.{arguments[0]}", *map(str, arguments[1:])],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
    classes = json.loads(done.stdout)["classes"]

    pixels = model_input(photograph, Preprocessing(256, 224))
    normalized = Normalization(source.preprocessing.mean, source.preprocessing.std)(jnp.asarray(pixels[None]))
    expected = jax.nn.softmax(model.apply(variables, normalized).logits[0])
    order = np.argsort(-expected)[:5]
    assert [guess["index"] for guess in classes] == order.tolist()
    np.testing.assert_allclose([guess["probability"] for guess in classes], expected[order], rtol=1e-4)
    names = runs.default_class_names(1000)
    assert [guess["name"] for guess in classes] == [names[i] for i in order]


@pytest.mark.slow
def test_from_a_workdir(tmp_path, photograph, digit_files, capsys):
    config = digits.get_config()
    config.model.depth = (1, 1)
    make_run(tmp_path / "run", config)
    runs.write_class_names(tmp_path / "run", [f"digit {i}" for i in range(10)])
    arguments = ["--checkpoint", str(tmp_path / "run"), str(photograph), str(digit_files[0]), "--top=10"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("%  ")[1] for line in lines[1:11]) == [f"digit {i}" for i in range(10)]
    shares = [float(line.split("%")[0]) for line in lines[1:11]]
    assert sum(shares) == pytest.approx(100, abs=0.6)
    assert shares == sorted(shares, reverse=True)


@pytest.mark.slow
def test_images_in_several_groups(digit_files):
    classifier = Classifier(weights.load(TEACHER))
    once = list(classifier.top(digit_files))
    assert len(once) == 10
    alone = [next(classifier.top([path])) for path in digit_files[8:]]
    for together, single in zip(once[8:], alone, strict=True):
        assert [guess.index for guess in together] == [guess.index for guess in single]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has the format of no known image"),
        (b"hello", "it has the format of no known image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "expected an image such as JPEG or PNG"),
    ],
    ids=["empty", "text", "broken"],
)
def test_no_image(tmp_path, capsys, content, message):
    (tmp_path / "x.png").write_bytes(content)
    assert message in error_of(capsys, "--checkpoint", TEACHER, tmp_path / "x.png")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            Image.fromarray(np.full((20, 20), 30000, np.uint16)),
            "has I;16 pixels; convert it to 8 bits a colour",
        ),
        (Image.new("RGB", (6000, 2)), "it has 6000×2 pixels, which is too narrow"),
    ],
    ids=["16 bits", "narrow"],
)
def test_images_that_would_be_misread(tmp_path, capsys, image, message):
    image.save(tmp_path / "x.png")
    assert message in error_of(capsys, "--checkpoint", TEACHER, tmp_path / "x.png")


def test_a_turned_photograph_is_seen_as_it_was_held(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, to be undone
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "straight.png")
    processing = Preprocessing(24, 16)
    np.testing.assert_array_equal(
        model_input(tmp_path / "turned.png", processing), model_input(tmp_path / "straight.png", processing)
    )


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_wrong_numbers_of_classes(capsys, value):
    assert main(["--checkpoint", str(TEACHER), "x.png", f"--top={value}"]) == 2
    assert "is not a whole number above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(digit_files):
    command = f"{sys.executable} -m bvit_jax.predict --checkpoint {TEACHER} {digit_files[0]} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_a_truncated_image(tmp_path, photograph, capsys):
    content = photograph.read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    assert "truncated" in error_of(capsys, "--checkpoint", TEACHER, tmp_path / "x.jpg")


def test_missing_files(tmp_path, photograph, capsys):
    assert "no file none.jpg" in error_of(capsys, "--checkpoint", TEACHER, "none.jpg")
    assert "no file or directory" in error_of(capsys, "--checkpoint", tmp_path / "none", photograph)


def test_damaged_weights_are_not_believed(digit_files):
    model = weights.load(TEACHER)
    model.variables["params"]["head"]["bias"][0] = np.nan
    with pytest.raises(UserError, match="is not finite; its weights are damaged"):
        Classifier(model).predict(digit_files[:1])


def test_assumptions_are_said(tmp_path, digit_files, capsys):
    state, _ = weights.to_format(tiny_pretrained("deit", width=64, num_heads=1), "timm")
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_files.encode_safetensors(state, {}))
    assert main(["--checkpoint", str(path), str(digit_files[0])]) == 0
    assert "does not say: norm_epsilon 1e-06" in capsys.readouterr().err


@pytest.mark.parametrize("square", [False, True])
def test_images_are_cut_or_squeezed(tmp_path, square):
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "x.png")
    image = model_input(tmp_path / "x.png", Preprocessing(24, 16, square=square))
    assert image.shape == (16, 16, 3)
    assert image.dtype == np.uint8


@pytest.mark.slow
def test_the_run_s_own_preprocessing_is_used(tmp_path):
    config = digits.get_config()
    config.model.depth = (1, 1)
    config.data.eval_resize = 40
    config.data.eval_interpolation = "bilinear"
    make_run(tmp_path / "run", config)
    model = runs.load_model(tmp_path / "run")
    assert dataclasses.asdict(model.preprocessing) == {
        "resize": 40,
        "crop": 32,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "square": False,
    }


@pytest.mark.slow
def test_names_that_a_terminal_would_obey_or_cannot_write(tmp_path, digit_files):
    path = tmp_path / "caf\u00e9\x1b[2J.png"
    path.write_bytes(digit_files[7].read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "bvit_jax.predict", "--checkpoint", TEACHER, "--top=1", path],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout.splitlines()[0] == f"{tmp_path}/caf\\xe9\\x1b[2J.png"
