"""Copies a data set that TFDS prepared as TFRecord files to ArrayRecord: same records, same order.

A TFRecord file is a sequence of records, each with its length, the checksum of the length, its bytes and
their checksum (masked CRC-32C). Every checksum is verified.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import tensorflow_datasets as tfds

from bvit_jax.data.folders import check_split_name
from bvit_jax.data.prepare.source import ARRAY_RECORD, stamp
from bvit_jax.data.prepare.writer import is_prepared, open_staging
from bvit_jax.data.progress import ProgressBar
from bvit_jax.data.splits import NAME, one_line
from bvit_jax.errors import UserError

TFRECORD = "tfrecord"
LENGTH = struct.Struct("<QI")
CHECKSUM = struct.Struct("<I")
MASK_DELTA = 0xA282EAD8
BUFFER = 1 << 20


def convert(
    directory: Path, data_dir: Path, name: str | None = None, counts: Mapping[str, int] | None = None
) -> Path:
    """Copies the TFRecord data set in ``directory`` shard by shard, and returns where the copy is.

    Call it again after an interruption: finished shards are kept.

    Args:
      directory: the one with ``dataset_info.json``, such as ``tensorflow_datasets/mnist/3.0.1``.
      data_dir: the TFDS directory to prepare in, which must not be that of ``directory``.
      name: expected name of the data set; None accepts any.
      counts: expected number of records of each split; None accepts what its description says.

    Raises:
      UserError: ``directory`` holds no such data set, a record is damaged, or the copy cannot be written.
    """
    info = _open(directory)
    if name not in (None, info.name):
        raise UserError(f"{directory} holds {info.name}; expected {name}")
    found = {name: split.num_examples for name, split in info.splits.items()}
    for split, count in (counts or {}).items():
        if found.get(split, 0) != count:
            raise UserError(f"{directory} has {found.get(split, 0):,} records of {split}; expected {count:,}")
    splits = dict(info.splits)
    _check_names(info, directory)
    info = _relocated(info, data_dir)
    target = Path(info.data_dir)
    if target.absolute() == directory.absolute():
        raise UserError(f"{target} is the data set to be copied; choose another --data_dir")
    fingerprint = repr(_stamps(splits))
    if is_prepared(target, found, fingerprint):
        return target
    with open_staging(info, fingerprint) as stage:
        finished = {}
        for split, split_info in splits.items():
            lengths = list(split_info.shard_lengths)
            with ProgressBar(f"copying {split}", sum(lengths)) as bar:
                for shard, (source, length) in enumerate(zip(split_info.filepaths, lengths)):
                    path = stage.shard_path(split, shard, len(lengths))
                    if not path.exists():  # a shard gets its name when it is complete
                        stage.write_shard(path, read_records(Path(source), length))
                    bar.advance(length)
            finished[split] = (lengths, int(split_info.num_bytes))
        stage.finish(finished)
    return target


def read_records(path: Path, count: int) -> Iterator[bytes]:
    """Yields the ``count`` records of a TFRecord file; raises `UserError` if it is damaged."""
    try:
        with path.open("rb", buffering=BUFFER) as file:
            size = os.fstat(file.fileno()).st_size
            for number in range(count):
                header = file.read(LENGTH.size)
                if len(header) < LENGTH.size:
                    raise UserError(f"{path} ends after {number} of {count} records; get that file again")
                length, checksum = LENGTH.unpack(header)
                _verify(header[:8], checksum, path, number)
                if length > size - file.tell():
                    raise UserError(f"{path} ends in the middle of record {number}; get that file again")
                record = file.read(length)
                footer = file.read(CHECKSUM.size)
                if len(footer) < CHECKSUM.size:
                    raise UserError(f"{path} ends in the middle of record {number}; get that file again")
                _verify(record, CHECKSUM.unpack(footer)[0], path, number)
                yield record
            if file.read(1):
                raise UserError(f"{path} holds more than the expected {count} records; get that file again")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def masked_crc32c(data: bytes) -> int:
    """Returns the CRC-32C of ``data`` as TFRecord files store it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def _verify(data: bytes, checksum: int, path: Path, number: int) -> None:
    if masked_crc32c(data) != checksum:
        raise UserError(f"{path} is damaged: wrong checksum in record {number}; get that file again")


def _open(directory: Path) -> tfds.core.DatasetInfo:
    if not (directory / "dataset_info.json").is_file():
        raise UserError(
            f"{directory} has no dataset_info.json; expected the directory of a version, such as "
            "tensorflow_datasets/imagenet2012/5.1.0"
        )
    try:
        info = tfds.builder_from_directory(directory).info
    except Exception as error:  # TFDS, protobuf and JSON each raise their own
        raise UserError(f"cannot read the description in {directory}: {one_line(error)}") from error
    if info.file_format.value != TFRECORD:
        raise UserError(f"{directory} is in {info.file_format.value} format; expected {TFRECORD}")
    if not info.splits:
        raise UserError(f"{directory} describes no splits; expected a prepared data set")
    return info


def _check_names(info: tfds.core.DatasetInfo, directory: Path) -> None:
    """Raises `UserError` for a name in the description that would leave the directory it is made for."""
    config = f"/{info.config_name}" if info.config_name else ""
    if not NAME.fullmatch(f"{info.name}{config}:{info.version}"):
        raise UserError(
            f"{directory} calls itself {info.name}{config}:{info.version}; expected name[/config]:version of"
            " letters, digits, underscores, dots and hyphens"
        )
    for split in info.splits.values():
        check_split_name(split.name, directory)
        if any(Path(path).parent.resolve() != directory.resolve() for path in split.filepaths):
            raise UserError(f"{directory} names files of {split.name} that are elsewhere; get it again")


def _relocated(info: tfds.core.DatasetInfo, data_dir: Path) -> tfds.core.DatasetInfo:
    """Returns the same description of a data set in ``data_dir``, in ArrayRecord format."""
    config = [info.config_name] if info.config_name else []
    proto = info.as_proto
    copy = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity.from_proto(
            proto, str(data_dir.joinpath(info.name, *config, str(info.version)))
        ),
        features=info.features,
    )
    description: Any = type(proto)()
    description.CopyFrom(proto)
    del description.splits[:]
    copy.as_proto.CopyFrom(description)
    copy.set_file_format(ARRAY_RECORD, override=True)
    return copy


def _stamps(splits: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    paths = [Path(path) for split in splits.values() for path in split.filepaths]
    try:
        return [stamp(path) for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; get that file again") from error
