import json
import re
import shutil
from pathlib import Path

import pytest

from bvit_jax import data
from bvit_jax.errors import UserError


@pytest.fixture
def copied_dir(data_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_dir, tmp_path / "copy"))


def test_opens_what_the_config_names(data_dir: str) -> None:
    split = data.open_split("photos", data_dir, "train[1:4]")
    assert (split.dataset, split.name, split.num_examples) == ("photos", "train[1:4]", 3)
    assert split.class_names == ("cat", "dog")
    assert split.source[0]["image"][:2] == b"\xff\xd8"  # still a JPEG file
    assert split.source[0]["label"] == 1


def test_default_directory(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    assert data.open_split("photos", "", "train").num_examples == 6


def test_versions_and_configs(copied_dir: Path) -> None:
    photos = copied_dir / "photos"
    for version in ["10.0.0", "9.0.0"]:
        shutil.copytree(photos / "2.1.0", photos / version)
        info = photos / version / "dataset_info.json"
        info.write_text(info.read_text().replace("2.1.0", version))
    path = str(copied_dir)
    newest = data.open_split("photos", path, "train")
    assert "/10.0.0" in str(newest.source.dataset_info)  # type: ignore[attr-defined]
    assert data.open_split("photos:2.1.0", path, "train").num_examples == 6
    with pytest.raises(UserError, match=re.escape("'photos:3.0.0' is not prepared")):
        data.open_split("photos:3.0.0", path, "train")

    shutil.copytree(photos / "2.1.0", copied_dir / "resized" / "small" / "2.1.0")
    assert data.open_split("resized/small", path, "train").num_examples == 6
    with pytest.raises(UserError, match=r"choose one of resized/small$"):
        data.open_split("resized", path, "train")
    with pytest.raises(UserError, match="did you mean 'resized'"):
        data.open_split("resize", path, "train")


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("photo", "train", "'photo' is not prepared in .*; did you mean 'photos'.*array_record"),
        ("imagenet2012", "train", "not prepared in .*; known: digits, photos; prepare it"),
        ("digits:2.0.0", "train", "'digits:2.0.0' is not prepared"),
        ("../digits", "train", r"config\.data\.dataset is '\.\./digits'; expected name"),
        ("digits", "trian", "no split 'trian' in digits; did you mean 'train'"),
        ("digits", "validation", "no split 'validation' in digits; known: test, train"),
        ("digits", "train[", "cannot open split 'train\\[' of digits: .*one of train, test"),
        ("digits", "train[5000:]", "cannot open split .*incompatible with 1437 examples"),
        ("digits", "train[:0]", "cannot open split 'train\\[:0\\]' of digits"),
    ],
)
def test_wrong_names(data_dir: str, dataset: str, split: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        data.open_split(dataset, data_dir, split)
    assert "\n" not in str(caught.value)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not prepared in .*/none; known: digits"):
        data.open_split("imagenet2012", str(tmp_path / "none"), "train")


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in [tmp_path / "file", tmp_path / "file" / "below"]:
        with pytest.raises(UserError, match=r"cannot use config\.data\.data_dir .*choose another"):
            data.open_split("digits", str(path), "train")


def test_unreadable_contents(copied_dir: Path) -> None:
    path = str(copied_dir)
    info = copied_dir / "photos" / "2.1.0" / "dataset_info.json"
    content = info.read_text()
    info.write_text(content.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"is in tfrecord format.*file_format='array_record'"):
        data.open_split("photos", path, "train")
    info.write_text(content[:100])
    with pytest.raises(UserError, match="cannot read the description of photos in"):
        data.open_split("photos", path, "train")
    info.unlink()
    with pytest.raises(UserError, match="cannot read the description of photos in"):
        data.open_split("photos", path, "train")
    info.write_text(content)
    features = info.with_name("features.json")
    tree = json.loads(features.read_text())
    kinds = tree["featuresDict"]["features"]
    kinds["picture"] = kinds.pop("image")
    features.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"has the features .*picture.*expected an image named"):
        data.open_split("photos", path, "train")


@pytest.mark.parametrize(("keep", "message"), [(None, "is missing"), (0.5, "is damaged, truncated")])
def test_a_shard_that_is_not_whole_is_found_at_the_start(
    copied_dir: Path, keep: float | None, message: str
) -> None:
    (shard,) = copied_dir.glob("digits/1.0.0/*test.array_record*")
    content = shard.read_bytes()
    shard.unlink()
    if keep is not None:
        shard.write_bytes(content[: int(keep * len(content))])
    assert data.open_split("digits", str(copied_dir), "train").num_examples == 1437
    for split in ("test", "test[:10%]", "train+test", "all"):
        with pytest.raises(UserError, match=f"split 'test' of digits: the shard .* {message}"):
            data.open_split("digits", str(copied_dir), split)
