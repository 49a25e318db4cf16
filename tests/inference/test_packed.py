"""Packed files: written, read, run, refused."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import bvit_jax
from bvit_jax import cli, models
from bvit_jax.binary.weights import DENSE
from bvit_jax.errors import UserError
from bvit_jax.inference import Classifier, engine, export
from bvit_jax.inference.packing import halved, pack, sizes
from bvit_jax.inference.stablehlo import write_program
from bvit_jax.weights import tensor_files
from bvit_jax.weights.packed import read_packed
from bvit_jax.weights.pretrained import Pretrained
from tests.processes import environment
from tests.tiny_models import abstract_of, random_variables, tiny_pretrained

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pretrained() -> Pretrained:
    return tiny_pretrained("react_deit_ls", depth=1)


@pytest.fixture(scope="module")
def packed(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model"
    export(pretrained, path)
    return path


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    target = tmp_path / "model"
    target.mkdir()
    for file in packed.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.slow
def test_a_packed_model_predicts_what_the_model_does(
    pretrained: Pretrained, packed: Path, image: Path
) -> None:
    model = bvit_jax.load(packed)
    assert model.class_names == pretrained.class_names
    assert model.preprocessing == pretrained.preprocessing
    assert model.config == pretrained.config.to_dict()
    assert model.config.name == "react_deit"
    found = model.predict([image, image])
    np.testing.assert_allclose(found, Classifier(pretrained).predict([image, image]), rtol=1e-4)
    np.testing.assert_array_equal(Classifier(pack(pretrained)).predict([image, image]), found)


def test_what_is_stored(pretrained: Pretrained, packed: Path) -> None:
    """The arrays of the engine, bit for bit, whose signs are those of the latent weights."""
    folded = engine.fold(pretrained.config, pretrained.variables)
    model = read_packed(packed)
    assert model.source == pretrained.digest()
    arrays = model.arrays()
    assert arrays.keys() == folded.keys()
    for name, array in folded.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    kernel = pretrained.variables["params"]["block0"]["mlp"]["contract"]["dense"]["kernel"]
    octets = arrays["block0/mlp/contract/negative"].astype("<u4")[None].view(np.uint8)
    octets = octets.reshape(-1, kernel.shape[1], 4).swapaxes(1, 2).reshape(-1, kernel.shape[1])
    negative = np.unpackbits(octets, axis=0, count=kernel.shape[0], bitorder="little")
    np.testing.assert_array_equal(1 - 2 * negative.astype(int), DENSE.codes(jnp.asarray(kernel)))


@pytest.mark.slow
def test_it_runs_with_jax_numpy_safetensors_and_pillow_alone(packed: Path, image: Path) -> None:
    command = [sys.executable, "-m", "tests.lean", str(packed), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["name"] == "react_deit"
    np.testing.assert_allclose(found["probabilities"], bvit_jax.load(packed).predict([image]), rtol=1e-4)


def error_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.slow
def test_the_commands(
    pretrained: Pretrained, tmp_path: Path, image: Path, capsys: pytest.CaptureFixture
) -> None:
    source, target = tmp_path / "native", tmp_path / "packed"
    bvit_jax.save(pretrained, source)
    assert cli.main(["export", str(source), str(target), "--format", "packed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{target}: react_deit, 0.0")
    total = sum(file.stat().st_size for file in target.iterdir())
    assert sum(int(line.split()[-2].replace(",", "")) for line in lines[1:]) == total
    assert cli.main(["predict", "--checkpoint", str(target), str(image), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["classes"][0]
    row = Classifier(pretrained).predict([image])[0]
    assert best["index"] == row.argmax()
    assert f"{target} exists" in error_of(capsys, "export", source, target)
    message = error_of(capsys, "convert", target, tmp_path / "back")
    assert "is a packed model, whose latent weights are gone" in message
    assert "packed already" in error_of_pack(Classifier(read_packed(target)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "packed"]


@pytest.mark.slow
def test_the_size_of_a_program_is_one_line(
    pretrained: Pretrained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bvit_jax.save(pretrained, tmp_path / "native")
    target = tmp_path / "program"
    with caplog.at_level("INFO"):
        assert cli.main(["export", str(tmp_path / "native"), str(target), "--format", "stablehlo"]) == 0
    assert "exporting: 3 done" in caplog.messages
    (line,) = capsys.readouterr().out.splitlines()
    total = sum(file.stat().st_size for file in target.iterdir())
    assert line.startswith(f"{target}: react_deit, {total / 1e6:.3f} MB;")


def error_of_pack(model: Classifier) -> str:
    with pytest.raises(UserError) as raised:
        pack(model)
    return str(raised.value)


def flip(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def truncate(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def change(key: str, value: Any) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        values = json.loads((path / "config.json").read_text())
        node = values["model"] if key in values["model"] else values
        node[key] = value
        (path / "config.json").write_text(json.dumps(values))

    return changed


def exchange(path: Path) -> None:
    """Puts another model's arrays in place of those."""
    other = tiny_pretrained("react_deit_ls", depth=1, width=16)
    content = tensor_files.encode_safetensors(pack(other).folded, {})
    (path / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "they were changed or damaged, or are another model's"),
        (truncate, "is the file complete?"),
        (exchange, "or are another model's"),
        (change("layout", 2), "has the layout 2 of packed models, and this version reads 1"),
        (change("depth", 2), "arrays that do not fit the settings of a packed react_deit"),
        (change("num_classes", 7), "they make logits \\(1, 3\\)"),
        (change("name", "deit"), "a 'deit' model cannot be packed"),
        (change("history", None), "is damaged"),
        (change("class_names", ["a"]), "it names 1 of 3 classes"),
        (lambda path: (path / "model.safetensors").unlink(), "cannot read"),
    ],
)
def test_damage(copied: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copied)
    with pytest.raises(UserError, match=message):
        bvit_jax.load(copied)


def test_what_a_packed_model_cannot(packed: Path, tmp_path: Path) -> None:
    model = bvit_jax.load(packed)
    with pytest.raises(UserError, match="no latent weights to save"):
        bvit_jax.save(model, tmp_path / "x")
    with pytest.raises(UserError, match="describes itself"):
        bvit_jax.load(packed, ema=True)


@pytest.mark.slow
def test_the_size_of_binaryvit_small(tmp_path: Path) -> None:
    """8.02 MB of learned values before folding; see ``bvit report cost``."""
    config = models.model_config("binaryvit")
    variables = random_variables(abstract_of(config))
    model = Pretrained(config, variables, tiny_pretrained("deit").preprocessing, ("class",) * 1000)
    export(model, tmp_path / "x")
    assert sum(file.stat().st_size for file in (tmp_path / "x").iterdir()) <= 8.1e6
    found = sizes(read_packed(tmp_path / "x").folded)
    binary = sum(a.size for path, a in _kernels(variables) if path not in ("patches", "head"))
    assert found["signs"] == binary / 8


def _kernels(variables: Any) -> list[tuple[str, np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return [(path[-2].key, array) for path, array in leaves if path[-1].key == "kernel"]


@pytest.mark.slow
def test_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On digits: top-1 of both, and of ``bvit eval``, and how many images change."""
    source = tiny_pretrained("react_deit_ls", num_classes=10, depth=1)
    source = dataclasses.replace(source, class_names=tuple("0123456789"))
    bvit_jax.save(source, tmp_path / "native")
    data = ["--config=deit_digits", "--config.eval_batch_size=120"]
    arguments = ["export", str(tmp_path / "native"), str(tmp_path / "half"), "--half", *data]
    assert cli.main([*arguments, "--split=test"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(
        r"float32 and float16 on 360 images of test: top-1 (\S+) % and (\S+) %, (\d+) images change", line
    )
    assert found is not None
    assert int(found[3]) < 20
    stored = read_packed(tmp_path / "half").folded
    kinds = {name: array.dtype for name, array in stored.items()}
    assert kinds["block0/mlp_end/alpha"] == kinds["embedding/positions"] == np.float16
    assert kinds["head/kernel"] == kinds["embedding/patches"] == kinds["block0/attention/scale"] == np.float32
    for name, top1 in (("native", float(found[1])), ("half", float(found[2]))):
        assert cli.main(["eval", f"--checkpoint={tmp_path / name}", *data]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["images"] == 360
        assert 100 * figures["top1"] == pytest.approx(top1, abs=1)
    assert cli.main(["export", str(tmp_path / "native"), str(tmp_path / "x"), *data]) == 2
    assert "--config goes with --half" in capsys.readouterr().err
    assert "add --half --config" in error_of(
        capsys, "export", tmp_path / "native", tmp_path / "x", "--split=test"
    )
    assert not (tmp_path / "x").exists()


def test_numbers_that_float16_does_not_hold(pretrained: Pretrained) -> None:
    packed = pack(pretrained)
    packed.folded["block0/mlp_end/alpha"][0] = 1e5
    with pytest.raises(UserError, match="block0/mlp_end/alpha holds 100000, too large for float16"):
        halved(packed)


@pytest.mark.slow
def test_a_program_runs_where_only_jax_is(packed: Path, pretrained: Pretrained, tmp_path: Path) -> None:
    """With any number of images, in a process that has no package but jax, flatbuffers and numpy."""
    target = tmp_path / "program"
    write_program(pack(pretrained), target, "0")
    size = pretrained.config.image_size
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    code = """
import sys
from pathlib import Path
import jax, numpy as np
folder, = sys.argv[1:]
images = np.load(folder + "/images.npy")
program = jax.jit(jax.export.deserialize(Path(folder, "program", "model.stablehlo").read_bytes()).call)
answers = [np.asarray(program(images[:count])) for count in (1, 3)]
assert not {"bvit_jax", "flax", "jaxtyping"} & set(sys.modules)
assert (answers[0] == answers[1][:1]).all()
np.save(folder + "/answers.npy", answers[1])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    found = np.load(tmp_path / "answers.npy")
    np.testing.assert_allclose(found, Classifier(pack(pretrained)).probabilities(images), rtol=1e-4)
    described = json.loads((target / "config.json").read_text())
    assert described["class_names"] == list(pretrained.class_names)
    assert described["output"] == f"probabilities, float32 [N, {len(pretrained.class_names)}]"
    with pytest.raises(UserError, match="program exists; delete it"):
        write_program(pack(pretrained), target, "0")


def test_a_program_needs_flatbuffers(
    pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("flatbuffers", "jax._src.export.serialization"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match="needs flatbuffers; install it"):
        write_program(pack(pretrained), tmp_path / "program", "0")
    assert not list(tmp_path.iterdir())
