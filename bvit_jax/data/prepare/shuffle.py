"""Sorts examples into the shards of TFDS, in bounded memory; can be interrupted at any time.

TFDS orders the records of a split by the MD5 hash of split name and key. The first step appends each
record to one of several bucket files, each for a range of hashes; the second turns the buckets into
shards one by one, and deletes them. The progress of both is saved in a small file that is replaced
atomically; a later run truncates the buckets to the sizes saved there, and continues.
"""

import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import tensorflow_datasets as tfds

from bvit_jax.data.prepare.source import Example, Key, Part, Source, SplitSource
from bvit_jax.data.prepare.tfds_internals import Hasher, ShardConfig, get_shard_boundaries
from bvit_jax.data.prepare.writer import Staging, cannot_write, is_prepared, open_staging
from bvit_jax.data.progress import ProgressBar
from bvit_jax.data.splits import one_line
from bvit_jax.errors import UserError

COMMIT_SECONDS = 10.0  # the work that an interruption may cost
BUCKET_BYTES = 1 << 30
MAX_BUCKETS = 200  # all are open at once; many systems allow 256 files
HASH_BITS = 128

# A record in the buckets: its hash in two halves, its position and checksum, and its part.
ENTRY = np.dtype(
    [
        ("high", "<u8"),
        ("low", "<u8"),
        ("bucket", "<u4"),
        ("part", "<u4"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("checksum", "<u4"),
    ]
)

logger = logging.getLogger(__name__)


@dataclass
class _State:
    """The progress of a split: parts that are in the buckets, then shards."""

    buckets: list[int]  # bytes in each
    parts: int = 0
    examples: int = 0
    num_bytes: int = 0
    shards: int = 0


def prepare(
    source: Source, *, commit_seconds: float = COMMIT_SECONDS, bucket_bytes: int = BUCKET_BYTES
) -> Path:
    """Writes ``source`` as an ArrayRecord data set, equal to what TFDS writes for the same keys.

    Returns the directory of the data set, which appears when it is complete. Call it again after an
    interruption: finished work is not repeated, and every file comes out the same, byte for byte.

    Args:
      source: the examples, and where the data set goes.
      commit_seconds: interval at which progress is saved.
      bucket_bytes: approximate size of a bucket.

    Raises:
      UserError: a part cannot be read, the counts are not as expected, two examples have the same
        key, or the disk is full.
    """
    target = Path(source.info.data_dir)
    counts = {split.name: split.num_examples for split in source.splits}
    if is_prepared(target, counts, source.fingerprint):
        return target
    with open_staging(source.info, source.fingerprint) as stage:
        _check_space(stage, source)
        finished = {}
        for split in source.splits:
            state = _load_state(stage, split, bucket_bytes)
            _fill_buckets(stage, split, state, commit_seconds)
            lengths = _write_shards(stage, split, state)
            finished[split.name] = (lengths, state.num_bytes)
        stage.finish(finished)
    return target


# ---------------------------------------------------------------- examples into buckets


def _fill_buckets(stage: Staging, split: SplitSource, state: _State, commit_seconds: float) -> None:
    if state.parts < len(split.parts):
        serializer = tfds.core.ExampleSerializer(stage.info.features.get_serialized_info())
        hasher = Hasher(split.name)
        committed = time.monotonic()
        with (
            _Buckets(stage.path, split.name, state) as buckets,
            ProgressBar(f"reading {split.name}", split.num_examples, state.examples) as bar,
        ):
            for number in range(state.parts, len(split.parts)):
                part = split.parts[number]
                for key, example in _examples(part):
                    # Sorted fields: protobuf's own order of a map differs between processes.
                    values = stage.info.features.encode_example(example)
                    record = serializer.get_tf_example(values).SerializeToString(deterministic=True)
                    buckets.add(hasher.hash_key(key), number, record)
                    bar.advance()
                state.parts = number + 1
                if state.parts == len(split.parts) or time.monotonic() - committed >= commit_seconds:
                    buckets.commit()
                    stage.write_json(_state_file(split), asdict(state))
                    committed = time.monotonic()
    if state.examples != split.num_examples:
        raise UserError(
            f"split {split.name} has {state.examples:,} examples; expected {split.num_examples:,}: files "
            f"are missing or unexpected; get them again and delete {stage.path}"
        )


def _examples(part: Part) -> Iterator[tuple[Key, Example]]:
    try:
        yield from part.examples()
    except OSError as error:  # otherwise it would be reported as an error in writing
        raise UserError(f"cannot read {part.name}: {error.strerror or one_line(error)}") from error


class _Buckets:
    """The open bucket files of a split, truncated to what an earlier run has saved."""

    def __init__(self, directory: Path, split: str, state: _State) -> None:
        self._paths = [_bucket_path(directory, split, i) for i in range(len(state.buckets))]
        self._index_path = _index_path(directory, split)
        self._state = state
        self._ends = list(state.buckets)
        self._entries: list[tuple[int, ...]] = []
        self._num_bytes = 0

    def __enter__(self) -> "_Buckets":
        with ExitStack() as stack:
            ends = [*self._ends, self._state.examples * ENTRY.itemsize]
            files = [
                stack.enter_context(_open_at(path, end))
                for path, end in zip([*self._paths, self._index_path], ends)
            ]
            self._files, self._index = files[:-1], files[-1]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, hashed: int, part: int, record: bytes) -> None:
        bucket = hashed * len(self._files) >> HASH_BITS
        _write(self._files[bucket], record)
        high, low = hashed >> 64, hashed & (2**64 - 1)
        offset, size = self._ends[bucket], len(record)
        self._entries.append((high, low, bucket, part, offset, size, zlib.crc32(record)))
        self._ends[bucket] += size
        self._num_bytes += size

    def commit(self) -> None:
        """Flushes everything to disk and updates the state, which the caller then saves."""
        _write(self._index, np.array(self._entries, ENTRY).tobytes())
        changed = {entry[2] for entry in self._entries}
        for file in [self._index, *(self._files[bucket] for bucket in changed)]:
            os.fsync(file.fileno())
        self._state.buckets = list(self._ends)
        self._state.examples += len(self._entries)
        self._state.num_bytes += self._num_bytes
        self._entries, self._num_bytes = [], 0


# ---------------------------------------------------------------- buckets into shards


def _write_shards(stage: Staging, split: SplitSource, state: _State) -> list[int]:
    """Returns the number of records of each shard."""
    index = np.fromfile(_index_path(stage.path, split.name), ENTRY, count=state.examples)
    index = index[np.lexsort((index["low"], index["high"]))]
    _check_unique(index, split)
    num_shards = ShardConfig().get_number_shards(state.num_bytes, len(index))
    ends = [0, *get_shard_boundaries(len(index), num_shards)]
    with (
        ProgressBar(f"writing {split.name}", len(index), ends[state.shards]) as bar,
        _BucketReader(stage.path, split) as reader,
    ):
        for shard in range(state.shards, num_shards):
            entries = index[ends[shard] : ends[shard + 1]]
            path = stage.shard_path(split.name, shard, num_shards)
            stage.write_shard(path, (reader.read(entry) for entry in entries))
            state.shards = shard + 1
            stage.write_json(_state_file(split), asdict(state))
            # Deleted as soon as possible, so that the records do not take twice the space.
            following = index["bucket"][ends[shard + 1] :]
            reader.delete_before(int(following[0]) if len(following) else len(state.buckets))
            bar.advance(len(entries))
    return np.diff(ends).tolist()


class _BucketReader:
    """Reads records from the buckets, in their order, and verifies their checksums."""

    def __init__(self, directory: Path, split: SplitSource) -> None:
        self._directory, self._split = directory, split
        self._bucket = -1
        self._file: BinaryIO | None = None
        self._deleted = 0

    def __enter__(self) -> "_BucketReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, entry: Any) -> bytes:
        bucket = int(entry["bucket"])
        path = _bucket_path(self._directory, self._split.name, bucket)
        if self._file is None or self._bucket != bucket:
            self.__exit__()
            self._file, self._bucket = path.open("rb"), bucket
        self._file.seek(int(entry["offset"]))
        record = self._file.read(int(entry["size"]))
        if zlib.crc32(record) != int(entry["checksum"]):
            raise UserError(
                f"{path} is damaged: wrong checksum of a record of {self._split.parts[entry['part']].name};"
                f" check the disk, delete {self._directory} and run the same command again"
            )
        return record

    def delete_before(self, bucket: int) -> None:
        while self._deleted < bucket:
            _bucket_path(self._directory, self._split.name, self._deleted).unlink(missing_ok=True)
            self._deleted += 1


def _check_unique(index: np.ndarray, split: SplitSource) -> None:
    (same,) = np.nonzero((np.diff(index["high"]) == 0) & (np.diff(index["low"]) == 0))
    if len(same):
        first, second = (split.parts[index["part"][same[0] + i]].name for i in (0, 1))
        raise UserError(
            f"split {split.name}: an example of {first} and one of {second} have the same name, and "
            f"{len(same) - 1} more pairs; expected unique names"
        )


# ---------------------------------------------------------------- files


def _check_space(stage: Staging, source: Source) -> None:
    """Raises `UserError` now rather than after hours if the disk is too small.

    What an earlier run has written counts as free.
    """
    one_bucket = max(split.num_bytes // _num_buckets(split, BUCKET_BYTES) for split in source.splits)
    needed = sum(split.num_bytes for split in source.splits) + one_bucket
    written = sum(path.stat().st_size for path in stage.path.rglob("*") if path.is_file())
    free = shutil.disk_usage(stage.path).free
    if free < needed - written:
        raise cannot_write(
            stage.path,
            f"about {(needed - written) / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free",
        )


def _load_state(stage: Staging, split: SplitSource, bucket_bytes: int) -> _State:
    saved = stage.read_json(_state_file(split))
    if saved is None:
        return _State(buckets=[0] * _num_buckets(split, bucket_bytes))
    state = _State(**saved)
    logger.info(
        "continuing: %s of %s parts of %s are read, %s shards are written",
        f"{state.parts:,}",
        f"{len(split.parts):,}",
        split.name,
        f"{state.shards:,}",
    )
    return state


def _num_buckets(split: SplitSource, bucket_bytes: int) -> int:
    return min(MAX_BUCKETS, 1 + split.num_bytes // bucket_bytes)


def _state_file(split: SplitSource) -> str:
    return f"{split.name}.json"


def _index_path(directory: Path, split: str) -> Path:
    return directory / f"{split}.index"


def _bucket_path(directory: Path, split: str, bucket: int) -> Path:
    return directory / f"{split}.bucket-{bucket:03d}"


def _open_at(path: Path, end: int) -> BinaryIO:
    """Opens a file for writing at ``end`` and cuts off the rest.

    Without a buffer, since on a full disk a buffer can be neither written nor discarded.
    """
    file = path.open("r+b" if path.exists() else "w+b", buffering=0)
    if file.seek(0, 2) < end:
        file.close()
        raise UserError(
            f"{path} is shorter than an earlier run has saved; check the disk, delete {path.parent} and run "
            "the same command again"
        )
    file.truncate(end)
    file.seek(end)
    return cast(BinaryIO, file)


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:  # an unbuffered write may be partial
        view = view[file.write(view) :]
