"""A tree of image files, ``<folder>/<split>/<class>/**/<image>``, as a TFDS data set.

As in torchvision's ``ImageFolder``, the labels are the sorted names of the class directories.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bvit_jax.data import folders
from bvit_jax.data.folders import Classes
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


def imagefolder_source(name: str, folder: Path, data_dir: Path) -> Source:
    """Returns the images below ``folder`` as the source of the data set ``name``.

    The features are ``image``, the bytes of the file; ``label``; and ``file_name``, the path below the
    split, which is also the key.

    Raises:
      UserError: there are no splits, no classes or no images; the splits have different classes.
    """
    check_name(name)
    listing = folders.listing(folder)
    info = dataset_info(
        data_dir,
        name,
        VERSION,
        file_features(next(iter(listing.values()))),
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


def _split(directory: Path, classes: Classes) -> SplitSource:
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
