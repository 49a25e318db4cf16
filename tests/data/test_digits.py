import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from bvit_jax import data
from bvit_jax.data import digits


def _read(split: data.Split) -> tuple[np.ndarray, np.ndarray]:
    records = [split.source[index] for index in range(split.num_examples)]
    images = [np.asarray(Image.open(io.BytesIO(record["image"]))) for record in records]
    return np.stack(images), np.array([record["label"] for record in records])


def test_content_is_scikit_learns(data_dir: str) -> None:
    bunch = load_digits()
    is_test = np.arange(1797) % 5 == 0
    for name, chosen, count in [("train", ~is_test, 1437), ("test", is_test, 360)]:
        split = data.open_split("digits", data_dir, name)
        images, labels = _read(split)
        assert split.num_examples == len(images) == count
        assert (split.num_classes, split.class_names) == (10, tuple("0123456789"))
        assert images.dtype == np.uint8
        assert images.shape == (count, 8, 8)
        np.testing.assert_array_equal(images, np.round(bunch.images[chosen] * 255 / 16))
        np.testing.assert_array_equal(labels, bunch.target[chosen])


def test_prepares_without_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digits.prepare(str(tmp_path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_another_process_may_be_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = digits.Digits._generate_examples

    def interrupted(self: Any, indices: np.ndarray) -> Iterator[Any]:
        monkeypatch.setattr(digits.Digits, "_generate_examples", generate)
        digits.prepare(str(tmp_path))
        assert data.open_split("digits", str(tmp_path), "test").num_examples == 360
        yield from generate(self, indices)

    monkeypatch.setattr(digits.Digits, "_generate_examples", interrupted)
    digits.prepare(str(tmp_path))
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]
    assert len(_read(data.open_split("digits", str(tmp_path), "train"))[0]) == 1437


@pytest.mark.slow
def test_a_killed_preparation_is_never_opened(tmp_path: Path) -> None:
    program = """
import os, sys
from bvit_jax.data import digits
def killed(self, indices, generate=digits.Digits._generate_examples):
    for example in generate(self, indices):
        if example[0] > 900:
            os.kill(os.getpid(), 9)
        yield example
digits.Digits._generate_examples = killed
digits.prepare(sys.argv[1])
"""
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert result.returncode == -9
    (left,) = (tmp_path / "digits").iterdir()
    # The worst moment: everything is written, the renaming is not done.
    shutil.copytree(tmp_path / "digits" / left.name, tmp_path / "digits" / "incomplete.A_1.0.0")
    (tmp_path / "digits" / "incomplete.A_1.0.0" / "dataset_info.json").write_text("{}")
    assert data.open_split("digits", str(tmp_path), "train").num_examples == 1437


@pytest.mark.slow
def test_works_without_tensorflow(tmp_path: Path) -> None:
    program = """
import importlib.machinery, sys
class InstalledButRefused:  # some libraries ask whether it is installed: that is allowed
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "tensorflow" else None
    def create_module(self, spec):
        raise AssertionError("imported TensorFlow")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, InstalledButRefused())
from bvit_jax import data
from bvit_jax.config import default_config
config = default_config().data
config.update(dataset="digits", data_dir=sys.argv[1], eval_split="test")
assert next(data.train_batches(config, 8, 4, seed=0))["image"].shape == (4, 8, 8, 3)
assert next(data.eval_batches(config, 8, 4))["image"].shape == (4, 8, 8, 3)
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
