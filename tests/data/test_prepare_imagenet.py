import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import extractor
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as official
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from bvit_jax import data
from bvit_jax.data import mini_imagenet
from bvit_jax.data.prepare import imagenet, prepare
from bvit_jax.data.prepare.__main__ import main
from bvit_jax.data.prepare.imagenet import TRAIN_TAR, VAL_TAR, imagenet_source
from bvit_jax.errors import UserError
from bvit_jax.weights.class_names import imagenet_classes
from tests.data.prepared import contents, jpeg, records, shards, value

ROOT = Path(__file__).parents[2]
COUNTS = {"train": 2000, "validation": 500}
EXPECT = "train=2000,validation=500"


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated tars."""
    path = tmp_path_factory.mktemp("mini")
    assert mini_imagenet.generate(path) == COUNTS
    return path


@pytest.fixture(scope="session")
def prepared(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set prepared from them."""
    return prepare(imagenet_source(mini, tmp_path_factory.mktemp("prepared"), COUNTS))


@pytest.fixture
def tfds_without_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """TFDS's own builder, with Python's files for TensorFlow's, and our way of re-encoding 23 images."""
    gfile = SimpleNamespace(GFile=open, exists=os.path.exists)
    for module in (official, imagenet_common, extractor):
        monkeypatch.setattr(module, "tf", SimpleNamespace(io=SimpleNamespace(gfile=gfile)))

    def fix_image(self: Any, name: str, image: Any) -> Any:
        return io.BytesIO(imagenet.to_rgb_jpeg(image.read())) if name in imagenet.TO_RGB else image

    monkeypatch.setattr(official.Builder, "_fix_image", fix_image)


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 16])
def test_equals_tfds_record_by_record(
    mini: Path,
    tmp_path: Path,
    num_shards: int,
    tfds_without_tensorflow: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_utils.ShardConfig, "get_number_shards", lambda *_: num_shards)
    mine = prepare(imagenet_source(mini, tmp_path / "mine", COUNTS), bucket_bytes=1_000_000)
    builder = official.Builder(data_dir=tmp_path / "tfds")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(mini)), file_format="array_record"
    )
    theirs = builder.data_path
    for split, count in COUNTS.items():
        assert [path.name for path in shards(mine, split)] == [path.name for path in shards(theirs, split)]
        assert len(shards(mine, split)) == num_shards
        assert records(mine, split) == records(theirs, split)
        assert len(records(mine, split)) == count
    for name in ("dataset_info.json", "features.json", "label.labels.txt"):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.slow
def test_content_is_that_of_the_tars(mini: Path, prepared: Path) -> None:
    expected = {}
    with tarfile.open(mini / TRAIN_TAR) as outer:
        for tar in outer:
            with tarfile.open(fileobj=outer.extractfile(tar)) as inner:
                for member in inner:
                    expected[member.name] = (tar.name[:9], inner.extractfile(member).read())  # type: ignore[union-attr]
    names = list(imagenet_classes())
    found = {value(record, "file_name").decode(): record for record in records(prepared, "train")}
    assert set(found) == set(expected)
    modes = set()
    for name, (synset, encoded) in expected.items():
        assert names[value(found[name], "label")] == synset
        image, original = value(found[name], "image"), Image.open(io.BytesIO(encoded))
        modes.add((original.format, original.mode))
        if (original.format, original.mode) in [("JPEG", "RGB"), ("JPEG", "L")]:
            assert image == encoded
        else:
            assert name in imagenet.TO_RGB
            again = Image.open(io.BytesIO(image))
            assert (again.format, again.mode, again.info["dpi"]) == ("JPEG", "RGB", (300, 300))
            # The colours have half the resolution, as TensorFlow's: compare blocks of 8 pixels.
            small = [x.convert("RGB").reduce(8) for x in (again, original)]
            assert np.abs(np.subtract(*(np.asarray(x, float) for x in small))).mean() < 5
    assert modes == {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")}


def test_validation_labels(prepared: Path) -> None:
    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    official_labels = path.read_text().split()
    names = list(imagenet_classes())
    for record in records(prepared, "validation"):
        number = int(value(record, "file_name").decode().removesuffix(".JPEG")[-8:])
        assert names[value(record, "label")] == official_labels[number - 1]


def test_opens(prepared: Path) -> None:
    split = data.open_split("imagenet2012", str(prepared.parents[1]), "train")
    assert (split.num_examples, split.num_classes) == (2000, 1000)
    assert split.class_names == tuple(imagenet_classes())
    assert data.open_split("imagenet2012:5.1.0", str(prepared.parents[1]), "validation").num_examples == 500


def test_official_numbers() -> None:
    checksums = tfds.core.tfds_path("datasets/imagenet2012/checksums.tsv").read_text()
    for name, size in imagenet.SIZES.items():
        assert f"/{name} {size} " in checksums
    assert len(imagenet.TO_RGB) == 23
    assert len(imagenet.validation_labels()) == imagenet.COUNTS["validation"]
    # Images of 110 kB on average are 1,024 and 64 shards for any overhead of a record.
    for split, num_bytes in [("train", 147_000_000_000), ("validation", 6_700_000_000)]:
        count = imagenet.COUNTS[split]
        expected = {"train": 1024, "validation": 64}[split]
        for overhead in (0, 200):
            size = num_bytes + overhead * count
            assert shard_utils.ShardConfig().get_number_shards(size, count) == expected


@pytest.mark.slow
def test_generated_tars_are_reproducible(mini: Path, tmp_path: Path) -> None:
    mini_imagenet.generate(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(mini)
    mini_imagenet.generate(tmp_path / "other", train_per_class=1, validation=7, seed=1)
    assert contents(tmp_path / "other") != contents(mini)
    path = prepare(imagenet_source(tmp_path / "other", tmp_path / "d", {"train": 1000, "validation": 7}))
    assert len(records(path, "train")) == 1000
    sizes = {Image.open(io.BytesIO(value(record, "image"))).size for record in records(path, "train")}
    assert len(sizes) > 500


def test_generated_classes_can_be_learned(prepared: Path) -> None:
    """The mean colour alone separates nearly all of the ten hues."""
    hues = []
    for record in records(prepared, "validation"):
        pixels = np.asarray(Image.open(io.BytesIO(value(record, "image"))).convert("RGB"), float)
        if np.ptp(pixels.mean((0, 1))) > 10:  # not a grey one
            hues.append((value(record, "label") % 10, pixels.mean((0, 1))))
    centres = [np.mean([colour for hue, colour in hues if hue == k], axis=0) for k in range(10)]
    guesses = [np.argmin([np.linalg.norm(colour - centre) for centre in centres]) for _, colour in hues]
    assert np.mean([guess == hue for guess, (hue, _) in zip(guesses, hues)]) > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_per_class": 0}, "--train_per_class is 0; expected at least 1"),
        ({"validation": 0}, "--validation is 0; expected 1 to 50,000"),
        ({"validation": 50_001}, "--validation is 50001; expected"),
        ({}, "ILSVRC2012_img_train.tar exists; delete it or choose another --out"),
    ],
)
def test_wrong_arguments_of_the_generator(mini: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mini_imagenet.generate(mini, **arguments)


# ---------------------------------------------------------------- damaged tars

Files = list[tuple[str, bytes]]


def _tar(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _write(directory: Path, train: dict[str, Files], val: Files) -> None:
    outer = [(f"{synset}.tar", _tar(files)) for synset, files in train.items()]
    (directory / TRAIN_TAR).write_bytes(_tar(outer))
    (directory / VAL_TAR).write_bytes(_tar(val))


@pytest.fixture
def tars(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes tars with one image a class, after a change of their content."""

    def write(change: Callable[[dict[str, Files], Files], None] = lambda train, val: None) -> Path:
        image = jpeg(0)
        train = {synset: [(f"{synset}_1.JPEG", image)] for synset in imagenet_classes()}
        val = [(f"ILSVRC2012_val_0000000{i}.JPEG", image) for i in range(1, 6)]
        change(train, val)
        _write(tmp_path, train, val)
        return tmp_path

    return write


def _prepare(directory: Path) -> Path:
    return prepare(imagenet_source(directory, directory / "data", {"train": 1000, "validation": 5}))


CASES: list[Any] = []


def _case(name: str, message: str) -> Callable[[Any], None]:
    return lambda change: CASES.append(pytest.param(change, message, id=name))


@_case("unknown synset", r"train\.tar holds n99999999\.tar, which is not one of the 1,000 synsets .*did you")
def _(train: Any, val: Any) -> None:
    train["n99999999"] = train.pop("n01440764")


@_case("no synset", r"train\.tar holds readme\.txt\.tar, which is not one of the 1,000 synsets of ImageNet;")
def _(train: Any, val: Any) -> None:
    train["readme.txt"] = []


@_case("missing synsets", r"train\.tar lacks 2 of the 1,000 synsets, such as n01440764\.tar, n01443537")
def _(train: Any, val: Any) -> None:
    del train["n01440764"], train["n01443537"]


@_case(
    "image of another synset", r"n01440764\.tar: n01443537_1\.JPEG is not named like an image of n01440764"
)
def _(train: Any, val: Any) -> None:
    train["n01440764"] = train["n01443537"]


@_case("image twice", r"n01440764\.tar: n01440764_1\.JPEG appears twice")
def _(train: Any, val: Any) -> None:
    train["n01440764"] *= 2


@_case(
    "no image", r"n01443537\.tar: n01443537_1\.JPEG cannot be used: .*expected JPEG and found 5 .* b'hello'"
)
def _(train: Any, val: Any) -> None:
    train["n01443537"] = [("n01443537_1.JPEG", b"hello")]


@_case("empty image", r"n01443537\.tar: n01443537_1\.JPEG cannot be used: .*expected JPEG and found 0 bytes")
def _(train: Any, val: Any) -> None:
    train["n01443537"] = [("n01443537_1.JPEG", b"")]


@_case("image cut in its header", r"n01443537_1\.JPEG cannot be used: .*expected JPEG and found 100 bytes")
def _(train: Any, val: Any) -> None:
    train["n01443537"] = [("n01443537_1.JPEG", jpeg(0)[:100])]


@_case("PNG for JPEG", r"n01443537\.tar: n01443537_1\.JPEG cannot be used: .*expected JPEG and found .*PNG")
def _(train: Any, val: Any) -> None:
    train["n01443537"] = [("n01443537_1.JPEG", jpeg(0, kind="PNG"))]


@_case("CMYK cut off", r"n01739381_1309\.JPEG is damaged: .*truncated.*; get that file again")
def _(train: Any, val: Any) -> None:
    train["n01739381"] = [("n01739381_1309.JPEG", jpeg(0, mode="CMYK")[:-200])]


@_case("PNG damaged", r"n02105855_2933\.JPEG is damaged: .*; get that file again")
def _(train: Any, val: Any) -> None:
    image = jpeg(0, kind="PNG")
    train["n02105855"] = [("n02105855_2933.JPEG", image[:60] + b"????" + image[64:])]


@_case("too many images", r"split train has 1,001 examples; expected 1,000: files are missing or unexpected")
def _(train: Any, val: Any) -> None:
    train["n01440764"].append(("n01440764_2.JPEG", jpeg(1)))


@_case("empty synset", r"split train has 999 examples; expected 1,000")
def _(train: Any, val: Any) -> None:
    train["n01440764"].clear()


@_case(
    "validation image missing", r"val\.tar lacks 1 file\(s\), such as ILSVRC2012_val_00000002\.JPEG; .* the 5"
)
def _(train: Any, val: Any) -> None:
    del val[1]


@_case(
    "validation image too many", r"val\.tar should not hold 1 file\(s\), such as val/x\.JPEG; expected the 5"
)
def _(train: Any, val: Any) -> None:
    val.append(("val/x.JPEG", jpeg(0)))


@_case("validation image twice", r"val\.tar holds some of its images twice")
def _(train: Any, val: Any) -> None:
    val.append(val[0])


@_case("validation image damaged", r"val\.tar: ILSVRC2012_val_00000003\.JPEG cannot be used")
def _(train: Any, val: Any) -> None:
    val[2] = (val[2][0], b"GIF89a")


@pytest.mark.parametrize(("change", "message"), CASES)
def test_wrong_content(tars: Callable[..., Path], change: Any, message: str) -> None:
    directory = tars(change)
    with pytest.raises(UserError, match=message) as caught:
        _prepare(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value) or "split train" in str(caught.value)
    with pytest.raises(UserError, match="'imagenet2012' is not prepared"):
        data.open_split("imagenet2012", str(directory / "data"), "train")


def test_synset_twice(tars: Callable[..., Path]) -> None:
    directory = tars()
    tar = _tar([("n01440764.tar", b"")])
    whole = (directory / TRAIN_TAR).read_bytes()
    (directory / TRAIN_TAR).write_bytes(tar[:512] + whole)
    with pytest.raises(UserError, match=r"train\.tar holds n01440764\.tar twice; get it again"):
        _prepare(directory)


def test_cut_off_anywhere(tars: Callable[..., Path]) -> None:
    directory = tars()
    for name in (TRAIN_TAR, VAL_TAR):
        path = directory / name
        whole = path.read_bytes()
        content = len(whole.rstrip(b"\0"))
        for length in [content * 2 // 3, content // 1024 * 512, 512, 700, 100, 0, -(-content // 512) * 512]:
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=rf"{name}.* (cut off|lacks)") as caught:
                imagenet_source(directory, directory / "data", {"train": 1000, "validation": 5})
            assert "\n" not in str(caught.value)
        path.write_bytes(whole)


def test_damaged_headers(tars: Callable[..., Path]) -> None:
    directory = tars()
    path = directory / TRAIN_TAR
    whole = path.read_bytes()
    for place, message in [
        (whole.index(b"n01443537.tar"), r"train\.tar is damaged or cut off at byte"),
        (whole.index(b"n01443537_1.JPEG"), r"train\.tar: n01443537\.tar is damaged or cut off"),
    ]:
        path.write_bytes(whole[:place] + b"?" + whole[place + 1 :])
        with pytest.raises(UserError, match=message):
            _prepare(directory)
    shutil.rmtree(directory / "data")
    # An inner tar that is shorter than its header says would otherwise be read into the next one.
    start = whole.index(b"n01443537_1.JPEG")
    inner = tarfile.TarInfo("n01443537_1.JPEG")
    inner.size = 50_000
    path.write_bytes(whole[:start] + inner.tobuf() + whole[start + 512 :])
    with pytest.raises(UserError, match=r"n01443537\.tar is cut off in the middle of n01443537_1\.JPEG"):
        _prepare(directory)


def test_no_plain_files(tars: Callable[..., Path]) -> None:
    directory = tars()
    link = tarfile.TarInfo("n01440764.tar")
    link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
    (directory / TRAIN_TAR).write_bytes(link.tobuf() + (directory / TRAIN_TAR).read_bytes())
    with pytest.raises(UserError, match=r"train\.tar holds n01440764\.tar, which is not a regular file"):
        _prepare(directory)


def test_missing_tar(tars: Callable[..., Path]) -> None:
    directory = tars()
    (directory / VAL_TAR).unlink()
    with pytest.raises(UserError, match=r"cannot read .*val\.tar: No such file.* expected ILSVRC2012"):
        _prepare(directory)
    with pytest.raises(UserError, match=r"cannot read .*train\.tar: No such file"):
        imagenet_source(directory / "none", directory)


def test_other_tars_do_not_continue_what_was_begun(tars: Callable[..., Path]) -> None:
    def damage(train: dict[str, Files], val: Files) -> None:
        train["n15075141"] = [("n15075141_1.JPEG", b"")]

    with pytest.raises(UserError, match="cannot be used"):
        _prepare(tars(damage))
    with pytest.raises(UserError, match=r"incomplete\.bvit_5\.1\.0 was begun from other files"):
        _prepare(tars())


# ---------------------------------------------------------------- the command


def _fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    lines = errors.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in errors
    return lines[-1]


def test_official_sizes_are_the_default(mini: Path, tmp_path: Path, capsys: Any) -> None:
    (mini / "manifest.json").write_text("{}")  # nothing next to the tars makes the check weaker
    line = _fails(capsys, "imagenet2012", "--tars", mini, "--data_dir", tmp_path)
    (mini / "manifest.json").unlink()
    size = (mini / TRAIN_TAR).stat().st_size
    assert f"train.tar has {size:,} bytes; expected 147,897,477,120: the download is incomplete" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ("train=2000", "--expect has no validation; expected all of train, validation"),
        ("train=2000,val=500", "--expect names the split 'val'; known: train, validation"),
        ("train=2000,validation=x", "--expect has 'validation=x'; expected validation= and a number above 0"),
        ("train=0,validation=5", "--expect has 'train=0'"),
        ("train=2000,validation=501", "val.tar lacks 1 file(s), such as ILSVRC2012_val_00000501.JPEG"),
        ("train=2001,validation=500", "split train has 2,000 examples; expected 2,001"),
    ],
)
def test_wrong_counts(mini: Path, tmp_path: Path, capsys: Any, expect: str, message: str) -> None:
    arguments = ["imagenet2012", "--tars", mini, "--data_dir", tmp_path, "--expect", expect]
    assert message in _fails(capsys, *arguments)


@pytest.mark.slow
def test_md5(mini: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["imagenet2012", "--tars", mini, "--data_dir", tmp_path, "--expect", EXPECT, "--verify_md5"]
    line = _fails(capsys, *arguments)
    assert "train.tar has the MD5 sum" in line
    assert "expected 1d675b47d978889d74fa0da5fadfb00e; get it again" in line
    sums = {name: hashlib.md5((mini / name).read_bytes()).hexdigest() for name in imagenet.MD5}
    monkeypatch.setattr(imagenet, "MD5", sums)
    assert main([str(argument) for argument in arguments]) == 0


def test_no_bucket_of_a_cloud(mini: Path, capsys: Any) -> None:
    line = _fails(capsys, "imagenet2012", "--tars", mini, "--data_dir", "gs://bucket/tfds")
    assert "expected a local path" in line


@pytest.mark.slow
def test_commands_as_documented(tmp_path: Path) -> None:
    """Both commands in processes of their own, with a TensorFlow that must not be touched."""
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('imported TensorFlow')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)

    tars = tmp_path / "tars"
    made = run("bvit_jax.data.mini_imagenet", "--out", tars, "--train_per_class", 1, "--validation", 20)
    assert made.returncode == 0, made.stderr
    command = made.stdout.splitlines()[1].replace("DIR", str(tmp_path / "data")).split()
    assert command[:4] == ["python", "-m", "bvit_jax.data.prepare", "imagenet2012"]
    done = run(*command[2:])
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'data' / 'imagenet2012' / '5.1.0'}: train 1,000 in 1 shards, validation 20 in 1" in (
        done.stdout
    )
    assert "reading train: 1,000 done" in done.stderr
    again = run("bvit_jax.data.mini_imagenet", "--out", tars)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert len(again.stderr.splitlines()) == 1
