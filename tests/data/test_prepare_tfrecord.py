import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.core.utils import shard_utils

from bvit_jax import data
from bvit_jax.data.prepare import prepare, tfrecord, writer
from bvit_jax.data.prepare.__main__ import main
from bvit_jax.data.prepare.tfrecord import masked_crc32c
from bvit_jax.errors import UserError
from tests.data.prepared import contents, records, shards, small_source


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in ArrayRecord, eight shards."""
    monkeypatch.setattr(shard_utils.ShardConfig, "get_number_shards", lambda *_: 8)
    return prepare(small_source(tmp_path / "original"))


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """The same in TFRecord, as TFDS lays it out."""
    directory = tmp_path / "tfrecord" / "noise" / "1.2.3"
    shutil.copytree(original, directory)
    for path in shards(directory, "train"):
        content = b"".join(map(_record, ArrayRecordReader(str(path)).read_all()))
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(content)
        path.unlink()
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    return directory


def test_reads_what_tensorflow_wrote(tmp_path: Path) -> None:
    """A file of TensorFlow 2.21: the records ``b"hello"``, nothing, and all bytes."""
    written = bytes.fromhex(
        "0500000000000000eab2043e68656c6c6fbb1f1c19"
        "000000000000000029039807d8ea82a2"
        f"00010000000000002fb308df{bytes(range(256)).hex()}60231ad3"
    )
    (tmp_path / "file").write_bytes(written)
    expected = [b"hello", b"", bytes(range(256))]
    assert list(tfrecord.read_records(tmp_path / "file", 3)) == expected
    assert b"".join(map(_record, expected)) == written


def test_copies_records_and_order(original: Path, copy: Path, tmp_path: Path) -> None:
    assert main(["tfrecord", str(copy), "--data_dir", str(tmp_path / "new")]) == 0
    new = tmp_path / "new" / "noise" / "1.2.3"
    assert records(new, "train") == records(original, "train")
    assert _contents(new) == _contents(original)
    assert data.open_split("noise", str(tmp_path / "new"), "train").num_examples == 300
    assert [path.name for path in new.parent.iterdir()] == ["1.2.3"]


def _contents(directory: Path) -> dict[str, Any]:
    files: dict[str, Any] = contents(directory)
    files["dataset_info.json"] = json.loads(files["dataset_info.json"])
    files.pop(writer.SOURCE)  # they were made from different files
    files["dataset_info.json"].pop("redistributionInfo", None)  # TFDS adds an empty one when it reads
    return files


def test_described_by_tfds(copy: Path) -> None:
    assert tfds.builder_from_directory(copy).info.file_format.value == "tfrecord"
    with pytest.raises(UserError, match="is in tfrecord format"):
        data.open_split("noise", str(copy.parents[1]), "train")


def test_continues(original: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_records = tfrecord.read_records

    def interrupted(path: Path, count: int) -> object:
        read.append(path.name)
        if len(read) == 4:
            raise KeyboardInterrupt
        return read_records(path, count)

    monkeypatch.setattr(tfrecord, "read_records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tfrecord.convert(copy, tmp_path / "new")
    assert not (tmp_path / "new" / "noise" / "1.2.3").exists()
    new = tfrecord.convert(copy, tmp_path / "new")
    assert len(read) == 9  # the fourth one twice
    assert _contents(new) == _contents(original)
    tfrecord.convert(copy, tmp_path / "new")
    assert len(read) == 9


def test_changed_source(copy: Path, tmp_path: Path) -> None:
    target = writer.staging_path(tmp_path / "new" / "noise" / "1.2.3")
    target.mkdir(parents=True)
    (target / "plan.json").write_text(json.dumps({"format": 1, "fingerprint": "another"}))
    with pytest.raises(UserError, match=r"was begun from other files"):
        tfrecord.convert(copy, tmp_path / "new")


def _flip(position: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = position % len(content)
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_flip(0), "00003-of-00008 is damaged: wrong checksum in record 0; get that file again"),
        (_flip(9), "00003-of-00008 is damaged: wrong checksum in record 0"),
        (_flip(100), "00003-of-00008 is damaged: wrong checksum in record 0"),
        (_flip(-20), r"00003-of-00008 is damaged: wrong checksum in record \d\d"),
        (_flip(-1), r"00003-of-00008 is damaged: wrong checksum in record \d\d"),
        (lambda content: content[:-1], r"00003-of-00008 ends in the middle of record \d\d; get"),
        (lambda content: content[:-300], r"00003-of-00008 ends in the middle of record \d\d; get"),
        (lambda content: content[:5], r"00003-of-00008 ends after 0 of 3\d records; get"),
        (lambda content: content + b"?", r"00003-of-00008 holds more than the expected 3\d records; get"),
        (lambda content: b"", r"00003-of-00008 ends after 0 of 3\d records; get"),
    ],
)
def test_damage(copy: Path, tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = copy / "noise-train.tfrecord-00003-of-00008"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        tfrecord.convert(copy, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new" / "noise" / "1.2.3").exists()


def test_missing_shard(copy: Path, tmp_path: Path) -> None:
    (copy / "noise-train.tfrecord-00003-of-00008").unlink()
    with pytest.raises(UserError, match=r"cannot read .*00003-of-00008: No such file.*; get that file again"):
        tfrecord.convert(copy, tmp_path / "new")


def test_wrong_directories(original: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no dataset_info\.json; expected the directory of a version"):
        tfrecord.convert(copy.parent, tmp_path / "new")
    with pytest.raises(UserError, match="is in array_record format; expected tfrecord"):
        tfrecord.convert(original, tmp_path / "new")
    with pytest.raises(UserError, match="is the data set to be copied; choose another --data_dir"):
        tfrecord.convert(copy, copy.parents[1])
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the description in"):
        tfrecord.convert(copy, tmp_path / "new")


def test_imagenet_has_its_counts(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["imagenet2012", "--from_tfrecord", str(copy), "--data_dir", str(tmp_path / "new")]
    assert main(arguments) == 1
    assert "holds noise; expected imagenet2012" in capsys.readouterr().err
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace('"name": "noise"', '"name": "imagenet2012"'))
    for path in copy.glob("noise-*"):
        path.rename(path.with_name(path.name.replace("noise", "imagenet2012")))
    assert main(arguments) == 1
    assert "has 300 records of train; expected 1,281,167" in capsys.readouterr().err
    assert main([*arguments, "--expect", "train=300,validation=5"]) == 1
    assert "has 0 records of validation; expected 5" in capsys.readouterr().err


@pytest.mark.parametrize("length", [1 << 40, 1 << 62, (1 << 64) - 1])
def test_a_record_that_claims_more_than_there_is(copy: Path, tmp_path: Path, length: int) -> None:
    header = struct.pack("<Q", length)
    content = header + struct.pack("<I", tfrecord.masked_crc32c(header)) + b"record"
    (copy / "noise-train.tfrecord-00003-of-00008").write_bytes(content)
    with pytest.raises(UserError, match="00003-of-00008 ends in the middle of record 0; get that file again"):
        tfrecord.convert(copy, tmp_path / "new")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"name": "noise"', '"name": "../../noise"', "calls itself|cannot read the description"),
        ('"name": "noise"', '"configName": "../../../x", "name": "noise"', "calls itself noise/../../../x:1"),
        ('"version": "1.2.3"', '"version": "../1"', "calls itself|cannot read the description"),
        ('"name": "train"', '"name": "../train"', "has the split '../train'; expected|cannot read"),
    ],
)
def test_names_that_leave_the_directory(copy: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    info = copy / "dataset_info.json"
    assert old in info.read_text()
    info.write_text(info.read_text().replace(old, new, 1))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        tfrecord.convert(copy, tmp_path / "new" / "deep" / "er")
    assert set(tmp_path.rglob("*")) == before
