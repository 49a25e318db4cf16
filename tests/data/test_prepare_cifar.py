import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bvit_jax import data
from bvit_jax.data.prepare import cifar, prepare
from bvit_jax.data.prepare.__main__ import main
from bvit_jax.data.prepare.cifar import cifar100_source
from bvit_jax.errors import UserError
from tests.data.prepared import records, value

COUNTS = {"train": 40, "test": 10}


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes strings and bytes as Python 2 did, with which the official batches were made."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

    def _save_string(self, text: str | bytes) -> None:
        encoded = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(encoded)) + encoded)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = _save_string


def _python2(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    # NumPy 2 writes its own new module name, which Python 2 did not know.
    return buffer.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def _batches() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    content: dict[str, Any] = {
        "meta": {
            "fine_label_names": [f"fine {i}" for i in range(100)],
            "coarse_label_names": [f"coarse {i}" for i in range(20)],
        }
    }
    for split, count in COUNTS.items():
        content[split] = {
            "filenames": [f"{i}.png" for i in range(count)],
            "batch_label": "batch 1 of 1",
            "fine_labels": rng.integers(0, 100, count).tolist(),
            "coarse_labels": rng.integers(0, 20, count).tolist(),
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        }
    return content


def _archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "dumps",
    [_python2, lambda value: pickle.dumps(value, protocol=3), lambda value: pickle.dumps(value, protocol=4)],
    ids=["python2", "protocol3", "protocol4"],
)
def test_records(tmp_path: Path, dumps: Callable[[Any], bytes]) -> None:
    batches = _batches()
    archive = _archive(tmp_path / cifar.ARCHIVE, {name: dumps(batch) for name, batch in batches.items()})
    path = prepare(cifar100_source(archive, tmp_path, COUNTS))
    assert path == tmp_path / "cifar100" / "3.0.2"
    for split, count in COUNTS.items():
        found = {value(record, "id").decode(): record for record in records(path, split)}
        assert sorted(found) == [f"{split}_{i:05d}" for i in range(count)]
        for i in range(count):
            record, batch = found[f"{split}_{i:05d}"], batches[split]
            assert value(record, "label") == batch["fine_labels"][i]
            assert value(record, "coarse_label") == batch["coarse_labels"][i]
            image = Image.open(io.BytesIO(value(record, "image")))
            assert (image.format, image.size, image.mode) == ("PNG", (32, 32), "RGB")
            planes = np.moveaxis(np.asarray(image), 2, 0)
            np.testing.assert_array_equal(planes.reshape(-1), batch["data"][i])


def test_opens_with_the_features_of_tfds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = _batches()
    _archive(tmp_path / cifar.ARCHIVE, {name: _python2(batch) for name, batch in batches.items()})
    arguments = ["cifar100", "--tar", str(tmp_path), "--data_dir", str(tmp_path / "data")]
    assert main([*arguments, "--expect", "train=40,test=10"]) == 0
    split = data.open_split("cifar100", str(tmp_path / "data"), "test")
    assert (split.num_examples, split.num_classes, split.class_names[7]) == (10, 100, "fine 7")
    mine = tfds.builder_from_directory(tmp_path / "data" / "cifar100" / "3.0.2").info.features
    theirs = tfds.builder("cifar100", data_dir=tmp_path / "none").info.features
    assert repr(mine) == repr(theirs)
    assert main([*arguments[:-1], str(tmp_path / "other")]) == 1
    assert "split train has 40 examples; expected 50,000" in capsys.readouterr().err


def test_order_is_that_of_tfds(tmp_path: Path) -> None:
    """TFDS shuffles CIFAR by the index of the image, hashed with the name of the split."""
    from tensorflow_datasets.core.hashing import Hasher

    batches = _batches()
    archive = _archive(tmp_path / "x", {name: _python2(batch) for name, batch in batches.items()})
    path = prepare(cifar100_source(archive, tmp_path, COUNTS))
    hasher = Hasher("train")
    expected = sorted(range(40), key=lambda index: hasher.hash_key(index))
    assert [value(record, "id").decode() for record in records(path, "train")] == [
        f"train_{index:05d}" for index in expected
    ]


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


class _Import:
    def __reduce__(self) -> Any:
        return (eval, ("1 + 1",))


@pytest.mark.parametrize("evil", [_Evil(), _Import(), {"data": _Evil()}, np.float64])
def test_runs_no_code(
    tmp_path: Path, evil: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {name: _python2(batch) for name, batch in _batches().items()}
    files["test"] = pickle.dumps(evil, protocol=3)
    archive = _archive(tmp_path / cifar.ARCHIVE, files)
    assert main(["cifar100", "--tar", str(archive), "--data_dir", str(tmp_path)]) == 1
    assert "is not allowed; get the archive again" in capsys.readouterr().err
    assert not (tmp_path / "evil").exists()


def _changed(batch: str, key: str, content: Any) -> Callable[[dict[str, Any]], None]:
    return lambda batches: batches[batch].update({key: content})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batches: batches.pop("meta"), "lacks meta; expected cifar-100-python"),
        (_changed("meta", "fine_label_names", ["a"]), "meta has no 100 fine_label_names"),
        (_changed("train", "data", [1, 2]), "train has no bytes of 32x32 images"),
        (_changed("train", "data", np.zeros((40, 3072))), "train has no bytes of 32x32 images"),
        (_changed("train", "data", np.zeros((40, 99), np.uint8)), "train has no bytes of 32x32 images"),
        (_changed("test", "fine_labels", [0] * 9), "test has no fine_labels from 0 to 99 for each image"),
        (_changed("test", "fine_labels", [0] * 9 + [100]), "test has no fine_labels from 0 to 99"),
        (_changed("test", "coarse_labels", [0] * 9 + ["x"]), "test has no coarse_labels from 0 to 19"),
    ],
)
def test_wrong_content(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    batches = _batches()
    change(batches)
    archive = _archive(tmp_path / "x", {name: _python2(batch) for name, batch in batches.items()})
    with pytest.raises(UserError, match=message) as caught:
        cifar100_source(archive, tmp_path, COUNTS)
    assert "\n" not in str(caught.value)


def test_damaged_archive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar-100-python\.tar\.gz is missing"):
        cifar100_source(tmp_path, tmp_path)
    archive = _archive(tmp_path / "x", {name: _python2(batch) for name, batch in _batches().items()})
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no archive"):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged or cut off|ended before .*; get it again"):
            cifar100_source(archive, tmp_path)
    _archive(archive, {"meta": b"", "train": b"?", "test": b"cnothing"})
    with pytest.raises(UserError, match=r"cannot read .*meta: .*; get the archive again"):
        cifar100_source(archive, tmp_path)
    _archive(archive, {"meta": pickle.dumps([1]), "train": b"?", "test": b"cnothing"})
    with pytest.raises(UserError, match=r"meta holds a list; expected a dict"):
        cifar100_source(archive, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "holds train, which is not a regular file"),
        ({"type": tarfile.SYMTYPE, "linkname": "train"}, "holds train, which is not a regular file"),
        ({"type": tarfile.LNKTYPE, "linkname": "gone"}, "holds train, which is not a regular file"),
        ({"size": 1 << 40}, "is cut off in the middle of train"),
        ({"count": 200}, "has over 100 files"),
    ],
)
def test_archives_made_to_harm(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / cifar.ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        for number in range(change.pop("count", 1)):
            member = tarfile.TarInfo("train" if number == 0 else str(number))
            for name, value_ in change.items():
                setattr(member, name, value_)
            assert archive.fileobj is not None
            archive.fileobj.write(member.tobuf())  # whatever follows it: newer Pythons would add no such lie
    with pytest.raises(UserError, match=message):
        cifar100_source(path, tmp_path / "data")


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "MAX_BYTES", 1 << 20)
    with tarfile.open(tmp_path / cifar.ARCHIVE, "w:gz") as archive:
        member = tarfile.TarInfo("train")
        member.size = 2 << 20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(UserError, match="cut off in the middle of train, at byte 1,048,576"):
        cifar100_source(tmp_path / cifar.ARCHIVE, tmp_path / "data")


def test_an_archive_that_a_browser_has_unpacked(tmp_path: Path) -> None:
    archive = _archive(tmp_path / cifar.ARCHIVE, {name: _python2(x) for name, x in _batches().items()})
    unpacked = tmp_path / "cifar-100-python.tar"
    unpacked.write_bytes(gzip.decompress(archive.read_bytes()))
    assert [split.num_examples for split in cifar100_source(unpacked, tmp_path, COUNTS).splits] == [40, 10]
