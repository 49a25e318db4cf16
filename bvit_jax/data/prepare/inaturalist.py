"""iNaturalist 2018 and 2019 in the layout that DeiT and BinaryViT read.

A directory with ``train<year>.json``, ``val<year>.json``, ``categories.json`` and the images. Labels are
the values of one rank (``kingdom`` to ``name``), in the order of the training annotations.
"""

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

from bvit_jax.data.prepare.source import (
    Part,
    Source,
    SplitSource,
    dataset_info,
    file_examples,
    file_features,
)
from bvit_jax.data.splits import one_line
from bvit_jax.errors import UserError, nearest
from bvit_jax.files import read_json

YEARS = (2018, 2019)
VERSION = "1.0.0"
RANKS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
SPLITS = {"train": "train", "validation": "val"}  # names in TFDS and in the file names
USED = ("images", "annotations", "file_name", "category_id", *RANKS)  # keys of the objects in the files
PART = 1000  # images
# Of annotations: bytes, and what separates their values. Those of 2018 have 120 MB and 9 million.
MAX_JSON, MAX_VALUES = 160_000_000, 10_000_000


def inaturalist_source(folder: Path, year: int, data_dir: Path, category: str = "name") -> Source:
    """Returns the images of one year as the source of ``inaturalist<year>``, or ``..._<category>``.

    An image's class is the number of its directory, as in BinaryViT (PyTorch): the annotations name it
    ``<tree>/<group>/<class>/<file>``; on disk it is there or in ``<tree>/<class>/<file>``.

    Args:
      folder: the directory with the annotation files.
      year: 2018 or 2019.
      data_dir: the TFDS directory to prepare in.
      category: the rank whose values are the labels.

    Raises:
      UserError: a file is missing or malformed.
    """
    if category not in RANKS:
        raise UserError(f"--category is {category!r}{nearest(category, RANKS)}")
    categories = _json(folder / "categories.json", list)
    annotations = {split: _json(folder / f"{stem}{year}.json", dict) for split, stem in SPLITS.items()}
    train = folder / f"train{year}.json"
    labels: dict[str, int] = {}
    for annotation in _list(annotations["train"], "annotations", train):
        rank = _rank(categories, _field(annotation, "category_id", train), category, train)
        labels.setdefault(rank, len(labels))
    digest = hashlib.sha256(str(folder.absolute()).encode())
    splits = []
    for split, stem in SPLITS.items():
        path = folder / f"{stem}{year}.json"
        images = []
        num_bytes = 0
        for entry in _list(annotations[split], "images", path):
            name, number, image, status = _located(folder, entry, path)
            rank = _rank(categories, number, category, path)
            if rank not in labels:
                raise UserError(f"{path}: {name} has the {category} {rank!r}, which {train} does not have")
            images.append((name, image, labels[rank]))
            num_bytes += status.st_size
            digest.update(repr((name, rank, status.st_size, status.st_mtime_ns)).encode())
        parts = [
            Part(f"{path}, images {i} and following", partial(file_examples, images[i : i + PART]))
            for i in range(0, len(images), PART)
        ]
        splits.append(SplitSource(split, len(images), num_bytes, tuple(parts)))
    info = dataset_info(
        data_dir,
        f"inaturalist{year}" + ("" if category == "name" else f"_{category}"),
        VERSION,
        file_features(labels),
        description=f"iNaturalist {year}, labelled by {category}.",
        homepage=f"https://github.com/visipedia/inat_comp/tree/master/{year}",
    )
    return Source(info, tuple(splits), fingerprint=digest.hexdigest())


def _located(folder: Path, entry: Any, path: Path) -> tuple[str, int, Path, os.stat_result]:
    """Returns the name, class, file and status of an image that ``path`` lists."""
    name = _field(entry, "file_name", path)
    parts = str(name).split("/")
    if len(parts) != 4 or not parts[2].isdecimal() or {"", ".."} & {*parts} or len(parts[2]) > 9:
        raise UserError(f"{path} lists {name!r}; expected <tree>/<group>/<number of the class>/<file>")
    tree, _, number, file = parts
    flat = folder / tree / number / file
    image = flat if flat.exists() else folder / str(name)
    try:
        return name, int(number), image, image.stat()
    except OSError as error:
        raise UserError(f"cannot read {image}, which {path} lists: {error.strerror}") from error


def _rank(categories: list[Any], number: Any, category: str, path: Path) -> str:
    if not isinstance(number, int) or not 0 <= number < len(categories):
        raise UserError(f"{path} names the category {number}; categories.json has 0 to {len(categories) - 1}")
    return str(_field(categories[number], category, path.parent / "categories.json"))


def _json(path: Path, kind: type) -> Any:
    try:
        value = read_json(path, MAX_JSON, MAX_VALUES, _used)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; get it again") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a {type(value).__name__}; expected a {kind.__name__}")
    return value


def _used(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an object of the files without what is not needed: the annotations have half a million."""
    return {key: entry[key] for key in USED if key in entry}


def _list(value: dict[str, Any], key: str, path: Path) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list) or not found:
        raise UserError(f"{path} has no list {key!r}; expected the annotations of the challenge")
    return found


def _field(value: Any, key: str, path: Path) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise UserError(f"{path} has an entry without {key!r}: {value!r:.80}")
    return value[key]
