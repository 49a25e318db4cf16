import io
import json
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bvit_jax.data.prepare import prepare
from bvit_jax.data.prepare.__main__ import main
from bvit_jax.data.prepare.icons import drawings, table
from bvit_jax.data.prepare.icons.drawings import class_of, icons_source, read_sets
from tests.data.prepared import contents, records, value


def _square(left: int) -> str:
    """Returns a drawing: a filled square in the second half of a line."""
    return f'<path fill="currentColor" d="M{left} 8h4v4h-4z"/>'


def _set(prefix: str, names: dict[str, str], licence: str = "MIT", **changes: Any) -> dict[str, Any]:
    author = {"name": f"designer of {prefix}"}
    info = {"name": prefix.title(), "author": author, "license": {"spdx": licence}}
    return {
        "prefix": prefix,
        "info": info | changes,
        "icons": {name: {"body": body} for name, body in names.items()},
        "aliases": {"home": {"parent": "house"}},
        "width": 16,
        "height": 16,
    }


SETS = [
    _set(
        "first",
        {"home-outline": _square(0), "cat-16": _square(1), "cat-24": _square(2), "qwerty": _square(3)},
    ),
    _set("second", {"house": _square(0), "cat": _square(5), "fish": '<text x="0">f</text>'}),
    _set("noto", {"fish": _square(6), "moon": '<path d="M0 0h1" fill="#f00"><animate/></path>'}),
    _set("free", {"cat": _square(9)}, licence="GPL-3.0"),
    _set("brands", {"cat": _square(10)}, category="Logos"),
]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a small package, which passes for the real one."""
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in [("info.json", {}), *((f"json/{s['prefix']}.json", s) for s in SETS)]:
            encoded = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(encoded)
            tar.addfile(member, io.BytesIO(encoded))
    monkeypatch.setattr(table, "SHA256", sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("home", "house"),
        ("home-outline", "house"),
        ("house-24-filled", "house"),
        ("outline-house", "house"),
        ("baseline_home_20px", "house"),
        ("arrow-left", "arrow-left"),
        ("plus-circle-bold-duotone", "plus-circle"),
        ("house-fire", None),
        ("outline", None),
        ("24", None),
    ],
)
def test_the_class_of_a_name(name: str, label: str | None) -> None:
    assert class_of(name) == label


def test_the_names_of_a_class_are_of_no_other() -> None:
    names = table.CLASSES.split()
    assert len(names) == len(set(names))
    assert len(set(drawings._classes().values())) == 237


def test_each_drawing_once_and_whole_sets_held_out(package: Path, tmp_path: Path, capsys: Any) -> None:
    main(["icons", f"--package={package}", f"--data_dir={tmp_path / 'data'}"])
    directory = tmp_path / "data" / drawings.NAME / drawings.VERSION
    info = tfds.builder_from_directory(directory).info
    assert info.features["label"].names == ["cat", "fish", "house"]
    found = {
        split: {value(record, "file_name"): value(record, "label") for record in records(directory, split)}
        for split in ("train", "test")
    }
    # Of second, the house is that of first; noto's moon moves.
    assert found == {
        "train": {b"first/home-outline": 2, b"first/cat-24": 0, b"second/cat": 0},
        "test": {b"noto/fish": 1},
    }
    assert "second: Second by designer of second, MIT, no address" in info.description
    assert "free" not in info.description
    printed = capsys.readouterr().out
    assert "cat                     2 train    0 test\n" in printed


def test_pixels(package: Path, tmp_path: Path) -> None:
    source = icons_source(read_sets(package), tmp_path)
    key, example = next(iter(source.splits[1].parts[0].examples()))
    assert key == "noto/fish"
    pixels = np.asarray(Image.open(io.BytesIO(example["image"])).convert("RGB"))
    expected = np.full((64, 64, 3), 255, np.uint8)
    expected[32:48, 24:40] = 0
    np.testing.assert_array_equal(pixels, expected)


def test_again_gives_the_same_files(package: Path, tmp_path: Path) -> None:
    first, second = (contents(prepare(icons_source(read_sets(package), tmp_path / name))) for name in "ab")
    assert first == second


def test_says_what_is_wrong_in_one_line(package: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def fails(path: Path) -> str:
        assert main(["icons", f"--package={path}", f"--data_dir={tmp_path}"]) == 1
        return str(capsys.readouterr().err)

    assert fails(tmp_path / "x.tgz").startswith(f"error: cannot read {tmp_path / 'x.tgz'}: No such file")
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(package.read_bytes()[:-9])
    message = fails(cut)
    assert message.startswith(f"error: {cut} has the SHA-256 sum ")
    assert message.endswith("get it with: npm pack @iconify/json@2.2.535\n")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert "pip install 'bvit_jax[prepare]'" in fails(package)
