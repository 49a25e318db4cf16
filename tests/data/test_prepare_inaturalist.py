import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import data
from bvit_jax.data.prepare import inaturalist, prepare
from bvit_jax.data.prepare.__main__ import main
from bvit_jax.data.prepare.inaturalist import RANKS, inaturalist_source
from bvit_jax.errors import UserError
from tests.data.prepared import jpeg, records, value

# Four species of three genera of two kingdoms, number 3 first in the training annotations.
SPECIES = [("Plantae", "Rosa", "Rosa canina"), ("Plantae", "Rosa", "Rosa rugosa")]
SPECIES += [("Animalia", "Felis", "Felis catus"), ("Animalia", "Canis", "Canis lupus")]
TRAIN, VAL = [3, 0, 2, 1, 3, 0], [0, 1, 2, 3]


def _annotations(year: int, numbers: list[int], first: int) -> dict[str, Any]:
    names = [f"train_val{year}/{SPECIES[n][0]}/{n}/{first + i}.jpg" for i, n in enumerate(numbers)]
    return {
        "images": [{"id": first + i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": first + i, "category_id": n} for i, n in enumerate(numbers)],
    }


def _dump(folder: Path, year: int, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name.format(year=year)).write_text(json.dumps(content))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(year: int = 2018, flat: bool = True, change: Callable[[Any], Any] = lambda files: None) -> Path:
        categories = [
            {**dict.fromkeys(RANKS, "x"), "id": i, "kingdom": kingdom, "genus": genus, "name": name}
            for i, (kingdom, genus, name) in enumerate(SPECIES)
        ]
        train, val = _annotations(year, TRAIN, 0), _annotations(year, VAL, 100)
        files = {"categories.json": categories, "train{year}.json": train, "val{year}.json": val}
        for image in [*train["images"], *val["images"]]:
            tree, group, number, file = image["file_name"].split("/")
            path = tmp_path / (f"{tree}/{number}/{file}" if flat else f"{tree}/{group}/{number}/{file}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(image["id"]))
        change(files)
        _dump(tmp_path, year, files)
        return tmp_path

    return make


@pytest.mark.parametrize("year", [2018, 2019])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(
    ("category", "names"),
    [
        ("name", ["Canis lupus", "Rosa canina", "Felis catus", "Rosa rugosa"]),
        ("genus", ["Canis", "Rosa", "Felis"]),
        ("kingdom", ["Animalia", "Plantae"]),
    ],
)
def test_labels(make: Any, year: int, flat: bool, category: str, names: list[str]) -> None:
    folder = make(year, flat)
    path = prepare(inaturalist_source(folder, year, folder / "data", category))
    name = f"inaturalist{year}" if category == "name" else f"inaturalist{year}_{category}"
    column = {"kingdom": 0, "genus": 1, "name": 2}[category]
    for split, numbers, first in [("train", TRAIN, 0), ("validation", VAL, 100)]:
        assert data.open_split(name, str(folder / "data"), split).class_names == tuple(names)
        found = {value(record, "file_name").decode().split("/")[3]: record for record in records(path, split)}
        assert len(found) == len(numbers)
        for i, number in enumerate(numbers):
            record = found[f"{first + i}.jpg"]
            assert value(record, "image") == jpeg(first + i)
            assert names[value(record, "label")] == SPECIES[number][column]


def test_command(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(2019)
    arguments = ["inaturalist", "--year", "2019", "--folder", str(folder), "--data_dir", str(folder / "data")]
    assert main(arguments) == 0
    assert "inaturalist2019/1.0.0: train 6 in 1 shards, validation 4 in 1" in capsys.readouterr().out
    assert main([*arguments, "--category", "gennus"]) == 1
    assert "--category is 'gennus'; did you mean 'genus'" in capsys.readouterr().err


def _drop_training_of(number: int) -> Callable[[Any], None]:
    def change(files: Any) -> None:
        train = files["train{year}.json"]
        kept = [i for i, entry in enumerate(train["annotations"]) if entry["category_id"] != number]
        train.update({key: [train[key][i] for i in kept] for key in train})

    return change


def _rename(name: str) -> Callable[[Any], None]:
    return lambda files: files["val{year}.json"]["images"][1].update(file_name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("categories.json"), r"cannot read .*categories\.json: No such file"),
        (lambda files: files.pop("val{year}.json"), r"cannot read .*val2018\.json: No such file"),
        (
            lambda files: files.update({"categories.json": {}}),
            r"categories\.json holds a dict; expected a list",
        ),
        (lambda files: files["train{year}.json"].pop("annotations"), r"train2018\.json has no list 'annotat"),
        (lambda files: files["val{year}.json"].update(images=[]), r"val2018\.json has no list 'images'"),
        (lambda files: files["val{year}.json"].update(images=[3]), r"has an entry without 'file_name': 3"),
        (lambda files: files["categories.json"].pop(), r"names the category 3; categories\.json has 0 to 2"),
        (
            lambda files: files["categories.json"][2].pop("name"),
            r"categories\.json has an entry without 'name'",
        ),
        (_drop_training_of(1), r"val2018\.json: .*/1/101\.jpg has the name 'Rosa rugosa', which .* not have"),
        (_rename("a/b.jpg"), r"val2018\.json lists 'a/b\.jpg'; expected <tree>/<group>/<number"),
        (_rename("../../1/b.jpg"), r"val2018\.json lists '\.\./\.\./1/b\.jpg'; expected"),
        (_rename("t/g/1/b.jpg"), r"cannot read .*t/g/1/b\.jpg, which .*val2018\.json lists: No such file"),
    ],
)
def test_wrong_content(make: Any, change: Callable[[Any], Any], message: str) -> None:
    folder = make(change=change)
    with pytest.raises(UserError, match=message) as caught:
        inaturalist_source(folder, 2018, folder / "data")
    assert "\n" not in str(caught.value)


def test_damaged_files(make: Any) -> None:
    folder = make()
    (folder / "train_val2018" / "2" / "2.jpg").write_bytes(b"GIF")
    with pytest.raises(UserError, match=r"2/2\.jpg cannot be used: .*expected an image and found 3 bytes"):
        prepare(inaturalist_source(folder, 2018, folder / "data"))
    (folder / "categories.json").write_text("[")
    with pytest.raises(UserError, match=r"cannot read .*categories\.json: .*; get it again"):
        inaturalist_source(folder, 2018, folder / "data")


def test_annotations_of_too_much(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    (folder / "val2018.json").write_text("[" + "{}," * 5_000_000 + "0]")
    with pytest.raises(UserError, match=r"about 10,000,001 values; expected at most 10,000,000"):
        inaturalist_source(folder, 2018, folder / "data")
    monkeypatch.setattr(inaturalist, "MAX_JSON", 1 << 20)
    with pytest.raises(UserError, match=r"has 15,000,003 bytes; expected at most 1,048,576"):
        inaturalist_source(folder, 2018, folder / "data")
