"""A tree of image files, ``<folder>/<split>/<class>/**/<image>``, as a TFDS data set.

As in torchvision's ``ImageFolder``, the labels are the sorted names of the class directories.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bvit_jax.data.prepare.source import (
    Example,
    Key,
    Part,
    Source,
    SplitSource,
    dataset_info,
    file_examples,
    file_features,
)
from bvit_jax.data.splits import NAME
from bvit_jax.errors import UserError

VERSION = "1.0.0"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def imagefolder_source(name: str, folder: Path, data_dir: Path) -> Source:
    """Returns the images below ``folder`` as the source of the data set ``name``.

    The features are ``image``, the bytes of the file; ``label``; and ``file_name``, the path below the
    split, which is also the key.

    Raises:
      UserError: there are no splits, no classes or no images; the splits have different classes.
    """
    check_name(name)
    splits = _directories(folder)
    if not splits:
        raise UserError(
            f"{folder} has no directories; expected splits such as train and val, with a directory per class"
        )
    listing = {
        split: {label: _images(folder / split / label) for label in _directories(folder / split)}
        for split in splits
    }
    first = splits[0]
    for split, classes in listing.items():
        if not classes:
            raise UserError(f"{folder / split} has no directories; expected one per class")
        differing = sorted(set(classes) ^ set(listing[first]))
        if differing:
            raise UserError(
                f"{folder}: only one of {first} and {split} has the class {differing[0]!r}; expected the "
                "same classes in every split"
            )
        for label, images in classes.items():
            if not images:
                raise UserError(
                    f"{folder / split / label} has no images; expected files *{', *'.join(SUFFIXES)}"
                )
    info = dataset_info(
        data_dir,
        name,
        VERSION,
        file_features(listing[first]),
        description=f"Images from a directory, prepared by bvit_jax: {', '.join(listing)}.",
    )
    digest = hashlib.sha256(repr((str(folder.absolute()), listing)).encode())
    return Source(
        info,
        tuple(_split(folder / split, classes) for split, classes in listing.items()),
        fingerprint=digest.hexdigest(),
    )


def check_name(name: str) -> None:
    """Raises `UserError` unless ``name`` can name a TFDS data set."""
    match = NAME.fullmatch(name)
    if match is None or match["name"] != name:
        raise UserError(f"{name!r} cannot name a data set; expected letters, digits and underscores")


def _split(directory: Path, classes: dict[str, list[tuple[str, int]]]) -> SplitSource:
    sizes = [size for images in classes.values() for _, size in images]
    return SplitSource(
        name=directory.name,
        num_examples=len(sizes),
        num_bytes=sum(sizes),
        parts=tuple(
            Part(str(directory / label), partial(_examples, directory, label, [path for path, _ in images]))
            for label, images in classes.items()
        ),
    )


def _examples(directory: Path, label: str, names: Sequence[str]) -> Iterator[tuple[Key, Example]]:
    return file_examples((f"{label}/{name}", directory / label / name, label) for name in names)


def _directories(path: Path) -> list[str]:
    try:
        found = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a directory") from error
    return sorted(name for name in found if not name.startswith("."))


def _images(directory: Path) -> list[tuple[str, int]]:
    """Returns the path below ``directory`` and the size of every image file, sorted."""
    found = []
    for parent, _, names in os.walk(directory, followlinks=True):
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                path = Path(parent, name)
                found.append((path.relative_to(directory).as_posix(), path.stat().st_size))
    return sorted(found)
