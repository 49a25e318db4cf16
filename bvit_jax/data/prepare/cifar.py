"""CIFAR-100 from the archive of its authors: the data set ``cifar100`` of TFDS, images as PNG files.

The archive holds pickles, which could run any code; here they can only make the arrays and lists they hold.
"""

import gzip
import io
import pickle
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from bvit_jax.data.prepare.source import Example, Part, Source, SplitSource, dataset_info, stamp
from bvit_jax.data.prepare.tars import list_members, read_member
from bvit_jax.data.splits import one_line
from bvit_jax.errors import UserError

NAME, VERSION = "cifar100", "3.0.2"  # those of TFDS, like the features and keys
ARCHIVE = "cifar-100-python.tar.gz"
COUNTS = {"train": 50_000, "test": 10_000}
SIDE = 32
# For each feature: the keys of its values and of its names, and the number of names.
LABELS = {
    "label": ("fine_labels", "fine_label_names", 100),
    "coarse_label": ("coarse_labels", "coarse_label_names", 20),
}
PART = 10_000  # images
GZIP = b"\x1f\x8b"  # the first bytes
MAX_MEMBERS, MAX_BYTES = 100, 1 << 29  # of the archive, which has 186 MB in 3 files

# What a pickled array refers to, under the names of NumPy 1 and 2.
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
REBUILD = ("numpy.core.multiarray", "numpy._core.multiarray")


def cifar100_source(archive: Path, data_dir: Path, counts: Mapping[str, int] | None = None) -> Source:
    """Returns the official archive as the source of ``cifar100``; ``label`` is the fine label.

    Args:
      archive: ``cifar-100-python.tar.gz``, or its directory.
      data_dir: the TFDS directory to prepare in.
      counts: number of images of ``train`` and ``test``; None for the official ones.

    Raises:
      UserError: the archive is missing, damaged or of another data set.
    """
    archive = archive / ARCHIVE if archive.is_dir() else archive
    members = _read_archive(archive, ("meta", "train", "test"))
    meta = _unpickle(members["meta"], f"{archive}: meta")
    features: dict[str, Any] = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
    }
    for feature, (_, key, count) in LABELS.items():
        names = meta.get(key)
        if not isinstance(names, list) or len(names) != count:
            raise UserError(f"{archive}: meta has no {count} {key}; get the archive again")
        features[feature] = tfds.features.ClassLabel(names=names)
    splits = []
    for split, count in (counts or COUNTS).items():
        batch = _checked_batch(_unpickle(members[split], f"{archive}: {split}"), f"{archive}: {split}")
        parts = [
            Part(f"{archive}: {split}", partial(_examples, split, batch, start))
            for start in range(0, len(batch["data"]), PART)
        ]
        splits.append(SplitSource(split, count, batch["data"].nbytes, tuple(parts)))
    info = dataset_info(
        data_dir,
        NAME,
        VERSION,
        features,
        description="CIFAR-100: 32x32 colour images of 100 classes in 20 groups.",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    )
    return Source(info, tuple(splits), fingerprint=repr((*stamp(archive), counts)))


def _read_archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with path.open("rb") as raw, gzip.open(raw) as unpacked:
            file = unpacked if raw.peek(2)[:2] == GZIP else raw  # some browsers unpack what they get
            for number, member in enumerate(list_members(file, str(path), end=MAX_BYTES)):
                if number == MAX_MEMBERS:
                    raise UserError(f"{path} has over {MAX_MEMBERS} files; get it again")
                if (name := Path(member.name).name) in names:
                    found[name] = read_member(file, member)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; expected {ARCHIVE} as its authors distribute it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; get it again") from error
    missing = sorted(set(names) - set(found))
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; expected {ARCHIVE}, the version for Python")
    return found


class _ArrayUnpickler(pickle.Unpickler):
    """Loads numbers, strings, lists, dicts and NumPy arrays only."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in REBUILD:
            return _reconstruct
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _reconstruct(kind: Any, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """Returns the empty array that the pickle then fills, as NumPy's private function does."""
    del kind, shape, code
    return np.ndarray.__new__(np.ndarray, (0,), "u1")


def _unpickle(data: bytes, name: str) -> dict[str, Any]:
    try:
        loaded = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # damaged pickles raise all kinds of errors
        raise UserError(f"cannot read {name}: {one_line(error)}; get the archive again") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{name} holds a {type(loaded).__name__}; expected a dict: get the archive again")
    return loaded


def _checked_batch(batch: dict[str, Any], name: str) -> dict[str, Any]:
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * SIDE * SIDE,):
        raise UserError(f"{name} has no bytes of {SIDE}x{SIDE} images; get the archive again")
    for key, _, count in LABELS.values():
        labels = batch.get(key)
        if (
            not isinstance(labels, list)
            or len(labels) != len(data)
            or any(type(x) is not int or not 0 <= x < count for x in labels)
        ):
            raise UserError(f"{name} has no {key} from 0 to {count - 1} for each image; get it again")
    return batch


def _examples(split: str, batch: dict[str, Any], start: int) -> Iterator[tuple[int, Example]]:
    for index in range(start, min(start + PART, len(batch["data"]))):
        pixels = batch["data"][index].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
        labels = {feature: batch[key][index] for feature, (key, _, _) in LABELS.items()}
        # An array would be encoded by TensorFlow; a Pillow image is encoded by Pillow.
        yield index, {"id": f"{split}_{index:05d}", "image": Image.fromarray(pixels), **labels}
