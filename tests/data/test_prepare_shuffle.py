import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import shard_utils

from bvit_jax import data
from bvit_jax.data.prepare import Source, prepare, shuffle, tfds_internals, writer
from bvit_jax.errors import UserError
from tests.data.prepared import contents, die_at, jpeg, records, shards, small_source

BUCKETS = 40_000  # bytes: about ten of them
ROOT = Path(__file__).parents[2]


@pytest.fixture
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets TFDS cut 300 small records into eight shards."""
    monkeypatch.setattr(shard_utils.ShardConfig, "get_number_shards", lambda *_: 8)


@pytest.fixture
def whole(tmp_path: Path, many_shards: None) -> Path:
    """The data set prepared without an interruption."""
    return prepare(small_source(tmp_path / "whole"), bucket_bytes=BUCKETS)


class Noise(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The same examples, for TFDS's own writer."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self) -> tfds.core.DatasetInfo:
        info = small_source(Path("none")).info
        return tfds.core.DatasetInfo(builder=self, features=info.features, description=info.description)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
        for part in small_source(Path("none")).splits[0].parts:
            yield from part.examples()


def test_equals_tfds(whole: Path, tmp_path: Path) -> None:
    Noise(data_dir=tmp_path / "tfds").download_and_prepare(file_format="array_record")
    theirs = tmp_path / "tfds" / "noise" / "1.2.3"
    assert records(whole, "train") == records(theirs, "train")
    mine, other = (tfds.builder_from_directory(path).info for path in (whole, theirs))
    assert len(shards(whole, "train")) == 8
    assert mine.splits["train"].shard_lengths == other.splits["train"].shard_lengths
    assert mine.splits["train"].num_bytes == other.splits["train"].num_bytes
    assert [path.name for path in shards(whole, "train")] == [path.name for path in shards(theirs, "train")]
    assert (whole / "features.json").read_bytes() == (theirs / "features.json").read_bytes()


def test_private_parts_of_tfds() -> None:
    """What `tfds_internals` imports still does the same."""
    message = f"tensorflow-datasets {tfds.__version__} shuffles or cuts data sets in another way"
    hashed = int(hashlib.md5(b"trainkey 7").hexdigest(), 16)
    assert tfds_internals.Hasher("train").hash_key("key 7") == hashed, message
    assert tfds_internals.ShardConfig().get_number_shards(147_000_000_000, 1_281_167) == 1024, message
    assert list(tfds_internals.get_shard_boundaries(10, 4)) == [2, 5, 8, 10], message


def test_tfds_itself_needs_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why there is a writer here: TFDS's keeps a split in memory, or needs TensorFlow's files."""
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    monkeypatch.setattr(tfds.core.shuffle, "MAX_MEM_BUFFER_SIZE", 100_000)
    with pytest.raises(ImportError, match="tensorflow"):
        Noise(data_dir=tmp_path).download_and_prepare(file_format="array_record")


def test_opens_and_leaves_nothing_else(whole: Path) -> None:
    split = data.open_split("noise", str(whole.parents[1]), "train")
    assert split.num_examples == 300
    assert sorted(split.source[i]["image"] for i in range(300)) == sorted(jpeg(i) for i in range(300))
    assert [path.name for path in whole.parent.iterdir()] == ["1.2.3"]


def test_files_depend_on_nothing_else(whole: Path, tmp_path: Path) -> None:
    for bucket_bytes, commit_seconds in [(10**9, 0.0), (3_000, 60.0)]:
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        source = small_source(tmp_path / "again")
        again = prepare(source, bucket_bytes=bucket_bytes, commit_seconds=commit_seconds)
        assert contents(again) == contents(whole)


def test_is_not_prepared_twice(whole: Path) -> None:
    before = contents(whole)
    (writer.staging_path(whole)).mkdir()  # as if the machine had crashed after the renaming

    def fail(number: int) -> None:
        raise AssertionError(number)

    assert prepare(small_source(whole.parents[1], on_part=fail)) == whole
    assert contents(whole) == before
    assert [path.name for path in whole.parent.iterdir()] == ["1.2.3"]
    with pytest.raises(UserError, match=r"1\.2\.3 exists and holds train 300; expected train 299; delete it"):
        prepare(small_source(whole.parents[1], num_examples=299))
    shards(whole, "train")[3].write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"1\.2\.3 exists and .*; delete it or choose another --data_dir"):
        prepare(small_source(whole.parents[1]))


# The process is killed at the moment that the last arguments name.
KILLED = """
import os, sys
from pathlib import Path
import pytest
from tests.data.prepared import die_at, small_source
from tests.data.test_prepare_shuffle import prepare_in_eight
die = lambda: os.kill(os.getpid(), 9)
with pytest.MonkeyPatch.context() as patch:
    die_at(patch, sys.argv[2], int(sys.argv[3]), die)
    prepare_in_eight(small_source(Path(sys.argv[1])))
"""


class _Killed(BaseException):
    """Stands for the end of the process, without the time that a process takes."""


def prepare_in_eight(source: Source) -> Path:
    """Prepares in eight shards and about ten buckets, saving progress after each part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_utils.ShardConfig, "get_number_shards", lambda *_: 8)
        return prepare(source, commit_seconds=0.0, bucket_bytes=BUCKETS)


def _kill(moment: str, count: int, source: Source) -> None:
    def die() -> None:
        raise _Killed

    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, moment, count, die)
        with pytest.raises(_Killed):
            prepare_in_eight(source)


def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    """Every run is killed a little later; the last one finds the rest and the result is the same."""
    directory = tmp_path / "killed"
    moments = [("record", 10), ("record", 80), ("rename", 2), ("rename", 4), ("record", 30), ("shard", 2)]
    moments += [("delete", 3), ("rename", 2), ("shard", 1), ("delete", 5), ("appear", 0)]
    read: list[int] = []
    for moment, count in moments:
        _kill(moment, count, small_source(directory, on_part=read.append))
        with pytest.raises(UserError, match="'noise' is not prepared"):
            data.open_split("noise", str(directory), "train")
    prepare_in_eight(small_source(directory, on_part=read.append))
    assert contents(directory / "noise" / "1.2.3") == contents(whole)
    assert [path.name for path in (directory / "noise").iterdir()] == ["1.2.3"]
    # A part is read again only if it was being read, or not yet saved, at the end of a run.
    assert set(read) == set(range(12))
    assert len(read) <= 12 + len(moments)


@pytest.mark.slow
def test_killed_processes(whole: Path, tmp_path: Path) -> None:
    """The same with SIGKILL, while records are read and while a shard is open."""
    for moment, count in [("record", 80), ("shard", 2)]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), moment, str(count)]
        result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == -9, result.stderr
    prepare_in_eight(small_source(tmp_path / "killed"))
    assert contents(tmp_path / "killed" / "noise" / "1.2.3") == contents(whole)


def test_finished_shards_are_not_written_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "stopped"
    _kill("shard", 5, small_source(directory))
    staged = writer.staging_path(directory / "noise" / "1.2.3")
    times = {path: path.stat().st_mtime_ns for path in shards(staged / "dataset", "train")}
    assert len(times) == 5
    finish = writer.Staging.finish

    def checked(*arguments: Any) -> None:
        assert {path: path.stat().st_mtime_ns for path in times} == times
        finish(*arguments)

    monkeypatch.setattr(writer.Staging, "finish", checked)
    again = prepare(small_source(directory), bucket_bytes=BUCKETS)
    assert contents(again) == contents(whole)


def _stop_in_part(number: int) -> Callable[[int], None]:
    def stop(part: int) -> None:
        if part == number:
            raise KeyboardInterrupt

    return stop


@pytest.fixture
def interrupted(tmp_path: Path, many_shards: None) -> Path:
    """A data directory in which seven parts are read."""
    source = small_source(tmp_path / "interrupted", on_part=_stop_in_part(7))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, commit_seconds=0.0, bucket_bytes=BUCKETS)
    return tmp_path / "interrupted"


def test_full_disk(whole: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = r"cannot write .*incomplete\.bvit_1\.2\.3: No space left on device; .* it continues where it"
    for owner, name in [(shuffle, "_write"), (writer, "replace"), (writer.Staging, "write_json")]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(UserError, match=message):
                prepare(small_source(interrupted), commit_seconds=0.0, bucket_bytes=BUCKETS)
    again = prepare(small_source(interrupted), bucket_bytes=BUCKETS)
    assert contents(again) == contents(whole)


def test_not_enough_space(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(interrupted)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="about 60 MB are needed and 0 MB are free; fix that"):
        prepare(small_source(interrupted, parts=1000), bucket_bytes=BUCKETS)


# In its own mount namespace, where the kernel allows that: a disk of a few hundred kB, full twice.
REALLY_FULL = """
import os, subprocess, sys
from pathlib import Path
from tensorflow_datasets.core.utils import shard_utils
from bvit_jax.data.prepare import prepare, shuffle
from bvit_jax.errors import UserError
from tests.data.prepared import small_source
shard_utils.ShardConfig.get_number_shards = lambda *_: 8
shuffle._check_space = lambda *_: None
disk, out = map(Path, sys.argv[1:])
for kilobytes in (200, 480, 4000):
    option = "size=4000k" if kilobytes == 200 else "remount,size=4000k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "none", str(disk)], check=True)
    (disk / "other").write_bytes(bytes((4000 - kilobytes) * 1000))
    try:
        prepare(small_source(disk / "d"), commit_seconds=0.0, bucket_bytes=40_000)
        print("prepared")
    except UserError as error:
        print(error)
subprocess.run(["cp", "-r", str(disk / "d"), str(out)], check=True)
"""


@pytest.mark.slow
def test_really_full_disk(whole: Path, tmp_path: Path) -> None:
    unshare = ["unshare", "--mount", "--map-root-user"]
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = [*unshare, "mount", "-t", "tmpfs", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this kernel lets nobody mount; test_full_disk covers the messages")
    command = [*unshare, sys.executable, "-c", REALLY_FULL, str(disk), str(tmp_path / "copy")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert all("incomplete.bvit_1.2.3: No space left on device; fix that" in line for line in lines[:2])
    assert lines[2] == "prepared"
    assert contents(tmp_path / "copy" / "noise" / "1.2.3") == contents(whole)


def test_damaged_intermediate_files(interrupted: Path) -> None:
    staged = interrupted / "noise" / "incomplete.bvit_1.2.3"
    bucket = sorted(staged.glob("train.bucket-*"))[2]
    content = bucket.read_bytes()
    bucket.write_bytes(content[:500] + b"?" + content[501:])
    with pytest.raises(UserError, match=r"bucket-002 is damaged: wrong checksum of a record of part \d+;"):
        prepare(small_source(interrupted), bucket_bytes=BUCKETS)


def test_lost_intermediate_files(interrupted: Path) -> None:
    staged = interrupted / "noise" / "incomplete.bvit_1.2.3"
    bucket = sorted(staged.glob("train.bucket-*"))[2]
    bucket.write_bytes(bucket.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"bucket-002 is shorter than an earlier run has saved; .* delete"):
        prepare(small_source(interrupted), bucket_bytes=BUCKETS)
    (staged / "train.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*train\.json: .*; delete .* to start over"):
        prepare(small_source(interrupted), bucket_bytes=BUCKETS)


def test_other_source(interrupted: Path) -> None:
    with pytest.raises(
        UserError, match=r"was begun from other files or with other options; delete .* start over"
    ):
        prepare(small_source(interrupted, fingerprint="b"))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    messages = []

    def on_part(number: int) -> None:
        if number == 3:
            with pytest.raises(UserError) as caught:
                prepare(small_source(tmp_path))
            messages.append(str(caught.value))

    prepare(small_source(tmp_path, on_part=on_part))
    assert len(messages) == 1
    assert messages[0].startswith("another process is preparing")


def test_wrong_counts_and_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split train has 300 examples; expected 301: files are missing"):
        prepare(small_source(tmp_path / "a", num_examples=301))
    source = small_source(tmp_path / "b", parts=3)
    parts = source.splits[0].parts
    object.__setattr__(source.splits[0], "parts", (parts[0], parts[1], parts[1]))
    with pytest.raises(UserError, match="of part 1 and one of part 1 have the same name, and 24 more"):
        prepare(source)


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.*incomplete\.bvit_1\.2\.3: Not a directory"):
        prepare(small_source(tmp_path / "file"))


def test_unreadable_source(tmp_path: Path) -> None:
    def on_part(number: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(UserError, match="cannot read part 0: Input/output error"):
        prepare(small_source(tmp_path, on_part=on_part))
