"""The staging directory, in which a data set is written until it is complete.

It is ``<data_dir>/<name>/incomplete.bvit_<version>``, a name that no reader takes for a data set. Its
``dataset`` holds finished shards; once all shards and the description are there, it is renamed to
``<data_dir>/<name>/<version>``, which is atomic. A later run continues from what an earlier one left.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from bvit_jax.data.prepare.source import ARRAY_RECORD
from bvit_jax.data.splits import num_records, one_line, shard_problem
from bvit_jax.errors import UserError
from bvit_jax.files import read_json, replace_file

WRITER_OPTIONS = "group_size:1"  # as in TFDS: every record can be read on its own
PLAN = "plan.json"
SOURCE = "bvit_source.json"  # in a finished data set: the digest of the fingerprint of what it was made from

logger = logging.getLogger(__name__)


class Staging:
    """The staging directory of the data set ``info``, used by one process at a time."""

    def __init__(self, info: tfds.core.DatasetInfo) -> None:
        self.info = info
        self.target = Path(info.data_dir)
        self.path = staging_path(self.target)
        self._dataset = self.path / "dataset"

    def read_json(self, name: str) -> Any:
        """Returns the content of a JSON file of this directory, None if it does not exist."""
        return _read_json(self.path / name, self.path)

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a JSON file of this directory; after a crash it holds the old or the new value."""
        replace_file(self.path / name, json.dumps(value).encode())
        _sync(self.path)

    def shard_path(self, split: str, shard: int, num_shards: int) -> Path:
        """Returns the path of a finished shard."""
        template = self._template(split)
        return Path(template.sharded_filepath(shard_index=shard, num_shards=num_shards))

    def write_shard(self, path: Path, records: Iterable[bytes]) -> None:
        """Writes one ArrayRecord file, which gets its name once it is complete and on disk."""
        self._dataset.mkdir(exist_ok=True)
        temporary = self.path / "shard.tmp"
        temporary.unlink(missing_ok=True)
        writer, count = ArrayRecordWriter(str(temporary), WRITER_OPTIONS), 0
        try:
            for record in records:
                writer.write(record)
                count += 1
        finally:
            error = _close(writer)  # a full disk is reported here, not earlier
        if error is None and num_records(str(temporary)) != count:
            error = f"{count} records were written and the file does not hold them"
        if error is not None:
            raise cannot_write(self.path, error)
        replace(temporary, path)

    def finish(self, splits: Mapping[str, tuple[list[int], int]]) -> None:
        """Writes the description, checks all shards and moves the data set to its final place.

        Args:
          splits: for each split, the number of records of each shard and the bytes of all records.

        Raises:
          UserError: a shard is missing or damaged.
        """
        infos = [
            tfds.core.SplitInfo(
                name=name, shard_lengths=lengths, num_bytes=num_bytes, filename_template=self._template(name)
            )
            for name, (lengths, num_bytes) in splits.items()
        ]
        self.info.set_splits(tfds.core.splits.SplitDict(infos))
        self.info.write_to_directory(self._dataset)
        digest = _digest(self.read_json(PLAN)["fingerprint"])
        replace_file(self._dataset / SOURCE, json.dumps({"fingerprint": digest}).encode())
        counts = {name: sum(lengths) for name, (lengths, _) in splits.items()}
        problem = _problem(self._dataset, counts)
        if problem:
            raise UserError(f"{self._dataset} {problem}; {_start_again(self.path)}")
        for path in self._dataset.iterdir():
            _sync(path)
        replace(self._dataset, self.target)
        shutil.rmtree(self.path)

    def _template(self, split: str) -> tfds.core.ShardedFileTemplate:
        return tfds.core.ShardedFileTemplate(
            data_dir=self._dataset, dataset_name=self.info.name, filetype_suffix=ARRAY_RECORD, split=split
        )


@contextlib.contextmanager
def open_staging(info: tfds.core.DatasetInfo, fingerprint: str) -> Iterator[Staging]:
    """Yields the staging directory of ``info``, new or as an interrupted run left it.

    Args:
      info: description of the data set; ``info.data_dir`` must not exist.
      fingerprint: that of the `Source`.

    Raises:
      UserError: an interrupted run had another source, another process is preparing the data set, or
        the directory cannot be written; also in place of any OSError inside the ``with``.
    """
    stage = Staging(info)
    try:
        stage.path.mkdir(parents=True, exist_ok=True)
        with (stage.path / "lock").open("a") as lock:
            _lock(lock.fileno(), stage.path)
            _check_plan(stage, fingerprint)
            yield stage
    except OSError as error:
        raise cannot_write(stage.path, error.strerror or one_line(error)) from error


def staging_path(target: Path) -> Path:
    """Returns the staging directory of the data set that will appear at ``target``."""
    return target.parent / f"incomplete.bvit_{target.name}"  # TFDS ignores incomplete.*


def is_prepared(target: Path, counts: Mapping[str, int], fingerprint: str) -> bool:
    """Returns whether the data set exists, and removes what a crash after its last step left behind.

    Args:
      target: the directory of the data set.
      counts: the number of records of each split.
      fingerprint: that of the `Source`. A data set of an earlier version, or of TFDS, has none to compare.

    Raises:
      UserError: a different or damaged data set is in its place, or one made from something else.
    """
    if not target.exists():
        return False
    problem = _problem(target, counts)
    if problem:
        raise UserError(f"{target} exists and {problem}; delete it or choose another --data_dir")
    source = target / SOURCE
    if source.exists() and _read_json(source, target) != {"fingerprint": _digest(fingerprint)}:
        raise UserError(
            f"{target} was prepared from other files, or these have changed since (path, size or time);"
            " delete it or choose another name or --data_dir"
        )
    shutil.rmtree(staging_path(target), ignore_errors=True)
    unknown = "; from which files is not known, since an earlier version or TFDS did it"
    logger.info("%s is already prepared%s", target, "" if source.exists() else unknown)
    return True


def replace(old: Path, new: Path) -> None:
    """Renames a file or directory; even a crash of the machine leaves no partial one."""
    _sync(old)
    old.replace(new)
    _sync(new.parent)


def cannot_write(path: Path, reason: str) -> UserError:
    """Returns the error for a preparation that can be continued."""
    if os.strerror(errno.ENOSPC) in reason:
        reason = os.strerror(errno.ENOSPC)
    return UserError(
        f"cannot write {path}: {reason}; fix that and run the same command again: it continues "
        "where it stopped"
    )


def _read_json(path: Path, directory: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; {_start_again(directory)}") from error


def _digest(fingerprint: str) -> str:
    return hashlib.sha256(fingerprint.encode(errors="surrogateescape")).hexdigest()


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is preparing {path}; wait for it") from None


def _check_plan(stage: Staging, fingerprint: str) -> None:
    plan = {"format": 1, "fingerprint": fingerprint}
    begun = stage.read_json(PLAN)
    if begun is None:
        stage.write_json(PLAN, plan)
    elif begun != plan:
        raise UserError(
            f"{stage.path} was begun from other files or with other options; {_start_again(stage.path)}"
        )


def _start_again(path: Path) -> str:
    return f"delete {path} and run the same command again to start over"


def _problem(directory: Path, counts: Mapping[str, int]) -> str | None:
    """Returns what is wrong with a finished data set, None if nothing is; opens every shard."""
    try:
        builder = tfds.builder_from_directory(directory)
        if builder.info.file_format.value != ARRAY_RECORD:
            return f"is in {builder.info.file_format.value} format; expected {ARRAY_RECORD}"
        found = {name: len(builder.as_data_source(name)) for name in builder.info.splits}
    except Exception as error:  # TFDS, protobuf, JSON and ArrayRecord each raise their own
        return f"cannot be opened: {one_line(error)}"
    if found != counts:
        return f"holds {_listed(found)}; expected {_listed(counts)}"
    problems = filter(None, map(shard_problem, builder.info.splits.values()))
    return next((f"is incomplete: {problem}" for problem in problems), None)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _close(writer: Any) -> str | None:
    try:
        writer.close()
    except RuntimeError as error:
        return one_line(error)
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
