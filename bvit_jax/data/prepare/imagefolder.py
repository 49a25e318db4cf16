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
from bvit_jax.data.splits import NAME, check_split_name
from bvit_jax.errors import UserError

VERSION = "1.0.0"
MAX_DEPTH = 50  # of directories in a class
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

Image = tuple[str, int, int]  # the path below a class, the size, and the time of the last change


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
    for split in splits:
        check_split_name(split, folder)
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
            _check_class(folder / split / label)
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


def _split(directory: Path, classes: dict[str, list[Image]]) -> SplitSource:
    sizes = [size for images in classes.values() for _, size, _ in images]
    return SplitSource(
        name=directory.name,
        num_examples=len(sizes),
        num_bytes=sum(sizes),
        parts=tuple(
            Part(
                str(directory / label), partial(_examples, directory, label, [path for path, _, _ in images])
            )
            for label, images in classes.items()
        ),
    )


def _examples(directory: Path, label: str, names: Sequence[str]) -> Iterator[tuple[Key, Example]]:
    return file_examples((f"{label}/{name}", directory / label / name, label) for name in names)


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
