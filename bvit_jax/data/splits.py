"""Random access to one split of any prepared TFDS image-classification dataset."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from bvit_jax.data import folders
from bvit_jax.errors import UserError, nearest
from bvit_jax.files import local_path

DIGITS = "digits"  # the only dataset that is prepared on first use
FOLDER = "folder"  # not prepared, but read in place
NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w-][\w.-]*))?(:(?P<version>\d+\.\d+\.\d+))?")
READERS = 32  # shards opened at once: a thousand of ImageNet, perhaps in a bucket
SAMPLES = 32  # of a split, which tell it from another one
VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(frozen=True)
class Split:
    """The encoded images of one split, and its classes.

    ``source[i]`` is ``{"image": bytes of a PNG or JPEG file, "label": int}`` for i from 0 to
    ``num_examples - 1`` and may be read from many threads; ``class_names[label]`` is the name of a label.
    """

    dataset: str
    version: str
    name: str
    source: Sequence[dict[str, Any]]
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...]


def open_split(dataset: str, data_dir: str, split: str) -> Split:
    """Opens ``split`` of ``dataset`` in ``data_dir``; prepares ``digits`` first if it is missing.

    Args:
      dataset: a TFDS name, ``name[/config][:version]``; without a version the newest is opened. Or
        ``folder``: ``data_dir`` holds image files, ``<split>/<class>/**``.
      data_dir: the TFDS directory; ``""`` means ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      split: a TFDS split such as ``train`` or ``train[:10%]``; a directory of a folder.

    Raises:
      UserError: the dataset is not prepared there, is not in ArrayRecord format or has no labelled
        images; the split does not exist or is empty; the directory cannot be read or written.
    """
    if dataset == FOLDER:
        return _open_folder(data_dir, split)
    root = _root(data_dir)
    try:
        path = _find(dataset, root) or _prepare_digits(dataset, root)
        names = sorted(path.name for path in _prepared_datasets(root)) if path is None else []
    except OSError as error:
        raise UserError(
            f"cannot use config.data.data_dir {str(root)!r}: {one_line(error)}; choose another"
        ) from error
    if path is None:
        raise UserError(
            f"config.data.dataset {dataset!r} is not prepared in {root}"
            f"{nearest(dataset, {*names, DIGITS})}; prepare it there with "
            "python -m bvit_jax.data.prepare or tfds's download_and_prepare(file_format='array_record'), "
            "or set config.data.data_dir"
        )
    return _open(dataset, path, split)


def sample_digest(split: Split) -> str:
    """Returns a digest of some images and labels of a split, the same wherever and however it was prepared.

    Raises:
      UserError: they cannot be read.
    """
    last = split.num_examples - 1
    places = sorted({place * last // (SAMPLES - 1) for place in range(SAMPLES)})
    digest = hashlib.sha256(str(split.num_examples).encode())
    try:
        with ThreadPoolExecutor(READERS) as pool:
            for record in pool.map(lambda place: split.source[place], places):
                digest.update(b"%d %s" % (record["label"], hashlib.sha256(record["image"]).digest()))
    except Exception as error:  # of the disk, TFDS or ArrayRecord
        raise UserError(
            f"cannot read split {split.name!r} of {split.dataset}: {one_line(error)}; check the disk, or"
            " prepare the dataset again"
        ) from error
    return digest.hexdigest()


def shard_problem(split: Any) -> str | None:
    """Returns what is wrong with the ArrayRecord files of a split, None if nothing is; reads their ends."""
    shards = list(zip(map(str, split.filepaths), split.shard_lengths, strict=True))
    with ThreadPoolExecutor(READERS) as pool:
        for (path, length), found in zip(shards, pool.map(num_records, (path for path, _ in shards))):
            if found is None:
                missing = "missing" if not os.path.exists(path) else "damaged, truncated or unreadable"
                return f"the shard {path} is {missing}"
            if found != length:
                return f"the shard {path} has {found:,} records; expected {length:,}"
    return None


def num_records(path: str) -> int | None:
    """Returns the number of records of an ArrayRecord file, None if it is missing or damaged."""
    try:
        reader = ArrayRecordReader(path)
        count = int(reader.num_records()) if reader.ok() else None
        reader.close()
    except (RuntimeError, ValueError):
        return None
    return count


def one_line(error: Exception) -> str:
    """Returns the message of another library's error on one line."""
    return " ".join(str(error).split())


def _root(data_dir: str) -> Any:
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return local_path(data_dir or default)


def _find(dataset: str, root: Any) -> Any:
    """Returns the directory of the newest matching version, or None."""
    match = NAME.fullmatch(dataset)
    if match is None:
        raise UserError(f"config.data.dataset is {dataset!r}; expected name[/config][:version]")
    parent = root / match["name"]
    if match["config"]:
        parent /= match["config"]
    versions = [path for path in _versions(parent) if match["version"] in (None, path.name)]
    if versions:
        return max(versions, key=lambda path: [int(part) for part in path.name.split(".")])
    configs = [path.name for path in _directories(parent) if any(_versions(path))]
    if configs and not match["config"]:
        raise UserError(
            f"config.data.dataset {dataset!r} has several configs in {root}; "
            f"choose one of {', '.join(f'{dataset}/{name}' for name in sorted(configs))}"
        )
    return None


def _open_folder(data_dir: str, split: str) -> Split:
    if not data_dir:
        raise UserError(
            f"config.data.dataset is {FOLDER!r}, and config.data.data_dir is empty; name the folder"
        )
    source, class_names = folders.files_of(local_path(data_dir), split)
    return Split(
        dataset=FOLDER,
        version="",
        name=split,
        source=source,
        num_examples=len(source),
        num_classes=len(class_names),
        class_names=class_names,
    )


def _prepare_digits(dataset: str, root: Any) -> Any:
    if dataset != DIGITS:
        return None
    from bvit_jax.data import digits  # scikit-learn is slow to import and needed only here

    digits.prepare(os.fspath(root))
    return _find(dataset, root)


def _open(dataset: str, path: Any, split: str) -> Split:
    try:
        builder = tfds.builder_from_directory(path)
        features, known = dict(builder.info.features.items()), list(builder.info.splits)
    except Exception as error:  # TFDS, protobuf and JSON each raise their own
        raise UserError(
            f"cannot read the description of {dataset} in {path}: {one_line(error)}; "
            "delete that directory and prepare the dataset again"
        ) from error
    if not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(features.get("label"), tfds.features.ClassLabel)
    ):
        raise UserError(
            f"config.data.dataset {dataset!r} has the features {', '.join(features)}; "
            "expected an image named 'image' and a class label named 'label'"
        )
    bare = re.split(r"[\[+]", split)[0]
    if bare not in [*known, "all"]:
        raise UserError(f"no split {split!r} in {dataset}{nearest(bare, known)}")
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        source = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError:
        raise UserError(
            f"{path} is in {builder.info.file_format.value} format, which has no random access;"
            " convert it with python -m bvit_jax.data.prepare tfrecord or prepare it again with"
            " file_format='array_record'"
        ) from None
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"cannot open split {split!r} of {dataset}: {one_line(error)}; "
            f"expected one of {', '.join(known)} or a part such as {known[0]}[:10%]"
        ) from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {dataset} in {path}: {one_line(error)}") from error
    for name in known if bare == "all" else set(re.findall(r"[\w-]+", split)) & set(known):
        if problem := shard_problem(builder.info.splits[name]):
            raise UserError(f"split {name!r} of {dataset}: {problem}; copy or prepare the dataset again")
    label = features["label"]
    return Split(
        dataset=dataset,
        version=str(builder.info.version),
        name=split,
        source=source,
        num_examples=len(source),
        num_classes=label.num_classes,
        class_names=tuple(label.names),
    )


def _prepared_datasets(root: Any) -> Iterator[Any]:
    for path in _directories(root):
        if any(_versions(path)) or any(any(_versions(config)) for config in _directories(path)):
            yield path


def _versions(parent: Any) -> Iterator[Any]:
    # TFDS prepares in "incomplete.XXXXXX_1.0.0", which does not match, and renames at the end.
    yield from (path for path in _directories(parent) if VERSION.fullmatch(path.name))


def _directories(parent: Any) -> list[Any]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
