import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import data
from bvit_jax.data.prepare import prepare
from bvit_jax.data.prepare.__main__ import main
from bvit_jax.data.prepare.imagefolder import imagefolder_source
from bvit_jax.data.prepare.writer import SOURCE
from bvit_jax.errors import UserError
from tests.data.prepared import jpeg, records, value

FILES = {
    "train/cat/1.jpg": jpeg(1),
    "train/cat/old/1.JPEG": jpeg(2, mode="L"),
    "train/dog/é.png": jpeg(3, kind="PNG"),
    "train/ant/3.jpg": jpeg(4, mode="CMYK"),
    "val/ant/3.jpg": jpeg(5),
    "val/cat/1.jpg": jpeg(6),
    "val/dog/9.webp": jpeg(7, kind="WEBP"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pets"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / "train" / "cat" / "readme.txt").write_text("not an image")
    (path / "train" / "cat" / ".hidden.jpg").write_text("not an image")
    (path / ".git" / "cat").mkdir(parents=True)
    return path


def test_labels_and_files(folder: Path, tmp_path: Path) -> None:
    path = prepare(imagefolder_source("pets", folder, tmp_path / "data"))
    assert path == tmp_path / "data" / "pets" / "1.0.0"
    found = {
        f"{split}/{value(record, 'file_name').decode()}": record
        for split in ("train", "val")
        for record in records(path, split)
    }
    assert set(found) == set(FILES)
    for name, content in FILES.items():
        assert value(found[name], "image") == content
        assert value(found[name], "label") == ["ant", "cat", "dog"].index(name.split("/")[1])


def test_opens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["imagefolder", "pets", "--folder", str(folder), "--data_dir", str(tmp_path)]
    assert main(arguments) == 0
    assert "pets/1.0.0: train 4 in 1 shards, val 3 in 1 shards" in capsys.readouterr().out
    split = data.open_split("pets", str(tmp_path), "val")
    assert split.class_names == ("ant", "cat", "dog")
    assert sorted(split.source[i]["label"] for i in range(3)) == [0, 1, 2]


def test_changed_files_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    first = imagefolder_source("pets", folder, tmp_path).fingerprint
    assert imagefolder_source("pets", folder, tmp_path).fingerprint == first
    (folder / "val" / "cat" / "2.jpg").write_bytes(jpeg(8))
    assert imagefolder_source("pets", folder, tmp_path).fingerprint != first


def _damage(path: Path, content: bytes | None) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("a/b", {}, "'a/b' cannot name a data set; expected letters, digits and underscores"),
        ("a:1.0.0", {}, "'a:1.0.0' cannot name"),
        ("pets", {"": None}, "cannot read .*pets: No such file or directory; expected a directory"),
        ("pets", {"": b"file"}, "cannot read .*pets: Not a directory"),
        ("pets", {"val/ant": None}, "pets: only one of train and val has the class 'ant'; expected the same"),
        ("pets", {"val/dog/9.webp": None}, r"val/dog has no images; expected files \*\.jpg, \*\.jpeg"),
        ("pets", {f"val/{x}": None for x in ("ant", "cat", "dog")}, "val has no directories; .* per class"),
        ("pets", {"train": None, "val": None, ".git": None}, "pets has no directories; expected splits"),
        (
            "pets",
            {"val/cat/1.jpg": b"GIF"},
            r"val/cat/1\.jpg cannot be used: it has the format of no known image; .* found 3 bytes",
        ),
        ("pets", {"val/cat/1.jpg": b""}, r"val/cat/1\.jpg cannot be used"),
    ],
)
def test_errors(folder: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    for path, content in changes.items():
        _damage(folder / path, content)
    with pytest.raises(UserError, match=message) as caught:
        prepare(imagefolder_source(name, folder, tmp_path / "data"))
    assert "\n" not in str(caught.value)


def test_file_that_disappears(folder: Path, tmp_path: Path) -> None:
    source = imagefolder_source("pets", folder, tmp_path / "data")
    (folder / "val" / "cat" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*val/cat/1\.jpg: No such file or directory"):
        prepare(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (f / "train/cat/gone.png").symlink_to("/nowhere"), r"cat/gone\.png: No such file.*a link"),
        (lambda f: (f / "train/cow").symlink_to("/nowhere"), "cannot read .*train/cow: No such file"),
        (lambda f: (f / "train/cat/up").symlink_to(".."), "cat/up is a link to a directory above it"),
        (lambda f: (f / "train/cat/me.jpg").symlink_to("me.jpg"), r"me\.jpg: Too many levels"),
        (lambda f: os.rename(f / "train/cat", f / "train/ cat"), "train/ cat' begins or ends with a space"),
        (
            lambda f: (f / "train/cat/new\nline.jpg").write_bytes(b""),
            "the name of .* has a line break; rename",
        ),
        (
            lambda f: os.mkdir(os.fsencode(f / "train/caf") + b"\xe9"),
            r"the name of .*caf\\udce9 is not UTF-8",
        ),
        (lambda f: os.mkfifo(f / "train/cat/pipe.jpg"), r"pipe\.jpg is not a regular file"),
        (lambda f: os.rename(f / "val", f / "val set"), "has the split 'val set'; expected letters, digits"),
        (lambda f: os.rename(f / "val", f / "all"), "has the split 'all'"),
        (
            lambda f: (f / "train/cat" / "/".join("d" * 60)).mkdir(parents=True),
            "more than 50 directories deep",
        ),
    ],
)
def test_folders_of_other_machines(
    folder: Path, tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(folder)
    with pytest.raises(UserError, match=message) as caught:
        imagefolder_source("pets", folder, tmp_path / "data")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "data").exists()


def test_a_name_that_was_prepared_from_something_else(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = prepare(imagefolder_source("pets", folder, tmp_path / "data"))
    assert prepare(imagefolder_source("pets", folder, tmp_path / "data")) == path
    same_size = (folder / "val" / "cat" / "1.jpg").read_bytes()[::-1]
    (folder / "val" / "cat" / "1.jpg").write_bytes(same_size)
    with pytest.raises(UserError, match=r"was prepared from other files, or these have changed since"):
        prepare(imagefolder_source("pets", folder, tmp_path / "data"))
    (path / SOURCE).unlink()  # as an earlier version leaves it
    with caplog.at_level("INFO", "bvit_jax"):
        assert prepare(imagefolder_source("pets", folder, tmp_path / "data")) == path
    assert "is already prepared; from which files is not known" in caplog.text
