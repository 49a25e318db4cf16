"""How a data set to be prepared is described to the writer, and checks of the files it is read from."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from bvit_jax.data import images
from bvit_jax.errors import UserError

Key = int | str
Example = dict[str, Any]
ARRAY_RECORD = "array_record"


@dataclass(frozen=True)
class Part:
    """A piece of a split that is read in one go; after an interruption, finished parts are not read again.

    ``examples()`` yields the key of each example, unique in its split, and the values of its features.
    Called again, it yields the same. ``name`` appears in messages.
    """

    name: str
    examples: Callable[[], Iterator[tuple[Key, Example]]]


@dataclass(frozen=True)
class SplitSource:
    """One split: its parts, how many examples they yield together, and roughly how many bytes."""

    name: str
    num_examples: int
    num_bytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Source:
    """A data set to be prepared.

    ``info.data_dir`` is where it will appear. ``fingerprint`` changes with the files that are read, so that
    a preparation begun from other files is not continued.
    """

    info: tfds.core.DatasetInfo
    splits: tuple[SplitSource, ...]
    fingerprint: str


def dataset_info(
    data_dir: Path,
    name: str,
    version: str,
    features: dict[str, Any],
    description: str,
    homepage: str | None = None,
) -> tfds.core.DatasetInfo:
    """Returns the description of the data set ``name`` below ``data_dir``; no TFDS builder is needed."""
    identity = tfds.core.DatasetIdentity(
        name=name,
        version=tfds.core.Version(version),
        data_dir=str(data_dir / name / version),
        module_name=__name__,
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=description,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "label"),
        homepage=homepage,
    )
    info.set_file_format(ARRAY_RECORD)
    return info


def check_image(encoded: bytes, name: str, formats: tuple[str, ...] = images.FORMATS) -> None:
    """Raises a `UserError` about ``name`` unless it begins like an image file (of one of ``formats``)."""
    try:
        images.check(encoded, formats)
    except images.ImageError as error:
        expected = "an image" if formats == images.FORMATS else " or ".join(formats)
        raise UserError(
            f"{name} cannot be used: {error}; expected {expected} and found {len(encoded):,} bytes that"
            f" begin with {encoded[:8]!r}; replace that file"
        ) from error


def stamp(path: Path) -> tuple[str, int, int]:
    """Returns what changes with a file: its path, size and time of change."""
    status = path.stat()
    return str(path.absolute()), status.st_size, status.st_mtime_ns


def file_features(class_names: Iterable[str]) -> dict[str, Any]:
    """Returns the features of a data set of image files: ``image``, ``label`` and ``file_name``."""
    return {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=list(class_names)),
        "file_name": tfds.features.Text(),
    }


def file_examples(files: Iterable[tuple[str, Path, int | str]]) -> Iterator[tuple[Key, Example]]:
    """Yields the examples of image files, whose names, paths and labels are given; the name is the key.

    Raises:
      UserError: a file cannot be read, or is no image.
    """
    for name, path, label in files:
        encoded = images.read(path)
        check_image(encoded, str(path))
        yield name, {"image": encoded, "label": label, "file_name": name}
