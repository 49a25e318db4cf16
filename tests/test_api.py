"""The public interface, as someone else's program uses it, and every example of the documentation."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import bvit_jax
from tests.processes import environment

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "bvit_jax" / "assets" / "deit_digits"
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))  # docs/examples: as notebooks
    if EXAMPLE.search(path.read_text(encoding="utf-8"))
]
# What is slow to import and not needed to build a model.
HEAVY = ("tensorflow_datasets", "grain", "orbax", "matplotlib", "sklearn")


@pytest.fixture(scope="module")
def teacher() -> Any:
    return bvit_jax.load(TEACHER)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Ten held-out digits, uint8 ``[10, 8, 8, 3]``, and what they show."""
    bunch = load_digits()
    images = np.round(bunch.images[:50:5] * (255 / 16)).astype(np.uint8)
    return np.repeat(images[..., None], 3, axis=-1), bunch.target[:50:5]


def modules_after(statement: str) -> set[str]:
    """Returns the top-level modules of a process that has run a statement."""
    program = f"{statement}\nimport sys\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_importing_costs_nothing() -> None:
    assert not {*HEAVY, "jax", "flax", "numpy"} & modules_after(
        "import bvit_jax; dir(bvit_jax); bvit_jax.__version__"
    )


@pytest.mark.slow
def test_building_a_model_imports_no_data_or_files() -> None:
    loaded = modules_after("import bvit_jax; bvit_jax.create_model(bvit_jax.model_config('deit'))")
    assert not {*HEAVY} & loaded


def test_every_public_name_is_there() -> None:
    for name in bvit_jax.__all__:
        assert getattr(bvit_jax, name) is not None
    assert set(bvit_jax.__all__) <= set(dir(bvit_jax))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        bvit_jax.lode  # noqa: B018


@pytest.mark.slow
def test_a_loaded_model_predicts(teacher: Any, digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    found = teacher.predict(images)
    assert found.shape == (10, 10)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert (found.argmax(1) == labels).mean() >= 0.9
    assert teacher.class_names == tuple("0123456789")
    assert teacher.config.name == "deit"
    assert [guess.name for (guess,) in teacher.top(images[:2], 1)] == [str(i) for i in found[:2].argmax(1)]


@pytest.mark.slow
def test_all_kinds_of_images_are_one(
    teacher: Any, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    images = digits[0][:3]
    pictures = [Image.fromarray(image) for image in images]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    expected = teacher.predict(images)
    mixed = [pictures[0], tmp_path / "1.png", images[2]]
    for same in (pictures, [str(tmp_path / f"{index}.png") for index in range(3)], mixed):
        np.testing.assert_array_equal(teacher.predict(same), expected)
    np.testing.assert_array_equal(bvit_jax.predict(TEACHER, images), expected)
    assert teacher.predict([]).shape == (0, 10)


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
def test_other_arrays_are_refused(teacher: Any, image: np.ndarray) -> None:
    with pytest.raises(bvit_jax.UserError, match=r"expected uint8 \[height, width, 3\]"):
        teacher.predict([image])


@pytest.mark.slow
def test_the_module_and_its_variables_give_the_same(
    teacher: Any, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    from bvit_jax.inference.images import model_input

    inputs = np.stack([model_input(image, teacher.preprocessing) for image in digits[0]])
    normalized = (inputs / np.float32(255) - 0.5) / 0.5
    logits = teacher.model.apply(teacher.variables, jnp.asarray(normalized, jnp.float32)).logits
    np.testing.assert_allclose(teacher.predict(digits[0]), jax.nn.softmax(logits), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_saved_models_are_read_again(
    teacher: Any, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    bvit_jax.save(teacher, tmp_path / "native")
    bvit_jax.save(teacher, str(tmp_path / "timm.safetensors"), format="timm")
    for path in ("native", "timm.safetensors"):
        again = bvit_jax.load(tmp_path / path)
        np.testing.assert_array_equal(again.predict(digits[0]), teacher.predict(digits[0]))
    with pytest.raises(bvit_jax.UserError, match="exists"):
        bvit_jax.save(teacher, tmp_path / "native")


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in an empty directory in which the bundled teacher is where it is in the repository."""
    (tmp_path / "bvit_jax").mkdir()
    (tmp_path / "bvit_jax" / "assets").symlink_to(TEACHER.parent)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"bvit_jax": bvit_jax, "__name__": "__main__"}
    for number, example in enumerate(EXAMPLE.findall(document.read_text(encoding="utf-8")), 1):
        exec(compile(example, f"{document.name}, example {number}", "exec"), names)


@pytest.mark.slow
def test_the_library_leaves_the_process_as_it_is(tmp_path: Path) -> None:
    """Handlers of signals, hooks, variables, the collector, logs and JAX's settings are the caller's."""
    command = [sys.executable, "-m", "tests.library_use", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    assert done.stdout.splitlines()[-1] == "[]"
