"""A tree of image files, ``<folder>/<split>/<class>/**/<image>``: what is in it, and its images in place.

As in torchvision's ``ImageFolder``, the labels are the sorted names of the class directories.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError, nearest

MAX_DEPTH = 50  # of directories in a class
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

SPLIT = re.compile(r"[A-Za-z0-9_-]+")

Image = tuple[str, int, int]  # the path below a class, the size, and the time of the last change
Classes = dict[str, list[Image]]


@dataclass(frozen=True)
class Files(Sequence[dict[str, Any]]):
    """Records as those of a prepared data set, read from files when they are asked for.

    Attributes:
      files: path and label of each image.
    """

    files: tuple[tuple[Path, int], ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        path, label = self.files[index]
        return {"image": path.read_bytes(), "label": label}


def files_of(folder: Path, split: str) -> tuple[Files, tuple[str, ...]]:
    """Returns the images of a split, in the order of their classes and paths, and the names of the classes.

    Raises:
      UserError: there is no such split, or what `listing` finds wrong.
    """
    found = listing(folder)
    if split not in found:
        raise UserError(f"no split {split!r} in {folder}{nearest(split, found)}")
    return (
        Files(
            tuple(
                (folder / split / name / path, label)
                for label, (name, images) in enumerate(found[split].items())
                for path, *_ in images
            )
        ),
        tuple(found[split]),
    )


def listing(folder: Path) -> dict[str, Classes]:
    """Returns the images of each class of each split.

    Raises:
      UserError: there are no splits, no classes or no images; the splits have different classes.
    """
    splits = _directories(folder)
    if not splits:
        raise UserError(
            f"{folder} has no directories; expected splits such as train and val, with a directory per class"
        )
    for split in splits:
        check_split_name(split, folder)
    found = {
        split: {label: _images(folder / split / label) for label in _directories(folder / split)}
        for split in splits
    }
    first = splits[0]
    for split, classes in found.items():
        if not classes:
            raise UserError(f"{folder / split} has no directories; expected one per class")
        differing = sorted(set(classes) ^ set(found[first]))
        if differing:
            raise UserError(
                f"{folder}: only one of {first} and {split} has the class {differing[0]!r}; expected the "
                "same classes in every split"
            )
        for label, images in classes.items():
            _check_class(folder / split / label)
            if not images:
                raise UserError(
                    f"{folder / split / label} has no images; expected files *{', *'.join(SUFFIXES)}"
                )
    return found


def check_split_name(name: str, place: Any) -> None:
    """Raises `UserError` for a name that TFDS could not parse again."""
    if not SPLIT.fullmatch(name) or name == "all":
        raise UserError(f"{place} has the split {name!r}; expected letters, digits, _ and -, and not 'all'")


def _directories(path: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(path) if entry.is_dir())


def _entries(path: Path) -> list[os.DirEntry[str]]:
    """Returns what a directory holds, without hidden entries.

    Raises:
      UserError: it cannot be listed, or holds a link to nothing or a name that cannot be written down.
    """
    try:
        with os.scandir(path) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a directory") from error
    for entry in entries:
        try:
            if entry.name.encode().decode().splitlines() != [entry.name]:
                raise UserError(f"the name of {entry.path!r} has a line break; rename it")
            entry.stat()
        except UnicodeError:
            raise UserError(f"the name of {entry.path} is not UTF-8; rename it") from None
        except OSError as error:
            hint = "a link to something that is gone? copy it again or delete it"
            raise UserError(f"cannot read {entry.path}: {error.strerror}; {hint}") from error
    return entries


def _check_class(path: Path) -> None:
    if path.name != path.name.strip():
        raise UserError(f"the name of {str(path)!r} begins or ends with a space; rename it")


def _images(directory: Path) -> list[Image]:
    """Returns every image file below ``directory``, sorted by path."""
    above = frozenset(map(_identity, (directory.parent.parent, directory.parent)))
    return sorted(_found(directory, directory, above))


def _found(directory: Path, below: Path, above: frozenset[tuple[int, int]]) -> Iterator[Image]:
    identity = _identity(directory)
    if identity in above:
        raise UserError(f"{directory} is a link to a directory above it; delete it")
    if len(above) > MAX_DEPTH:
        raise UserError(f"{directory} is more than {MAX_DEPTH} directories deep; expected images of a class")
    for entry in _entries(directory):
        if entry.is_dir():
            yield from _found(Path(entry.path), below, above | {identity})
        elif entry.name.lower().endswith(SUFFIXES):
            if not entry.is_file():
                raise UserError(f"{entry.path} is not a regular file; expected an image")
            status = entry.stat()
            yield Path(entry.path).relative_to(below).as_posix(), status.st_size, status.st_mtime_ns


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
