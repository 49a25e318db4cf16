"""What the tests of preparation share: small sources, and reading what was written."""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from bvit_jax.data.prepare import Part, Source, SplitSource, shuffle, writer
from bvit_jax.data.prepare.source import dataset_info


def jpeg(seed: int, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    """Returns an image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def small_source(
    data_dir: Path,
    parts: int = 12,
    per_part: int = 25,
    on_part: Callable[[int], None] = lambda number: None,
    **changes: Any,
) -> Source:
    """Returns a source of random images; ``on_part`` is called with the number of a part when it is read."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }

    def examples(number: int) -> Iterator[tuple[str, dict[str, Any]]]:
        on_part(number)
        for i in range(per_part):
            index = number * per_part + i
            yield f"key {index}", {"image": jpeg(index), "label": index % 10}

    split = SplitSource(
        name="train",
        num_examples=changes.pop("num_examples", parts * per_part),
        num_bytes=parts * per_part * 1200,
        parts=tuple(Part(f"part {n}", lambda n=n: examples(n)) for n in range(parts)),  # type: ignore[misc]
    )
    return Source(
        info=dataset_info(data_dir, "noise", "1.2.3", features, description="For tests."),
        splits=(split,),
        fingerprint=changes.pop("fingerprint", "a"),
    )


def die_at(patch: pytest.MonkeyPatch, moment: str, count: int, die: Callable[[], None]) -> None:
    """Lets a preparation call ``die`` at a moment: when it has come to it ``count`` times before.

    Args:
      patch: what is changed for that.
      moment: "record", "rename", "appear" (the last renaming), "delete" or "shard".
      count: how often the moment passes.
      die: ends the process, or stands for that.
    """
    owner, name = {
        "record": (shuffle, "_write"),
        "rename": (Path, "replace"),
        "appear": (Path, "replace"),
        "delete": (Path, "unlink"),
        "shard": (writer, "num_records"),
    }[moment]
    original, passed = getattr(owner, name), 0

    def function(*arguments: Any, **options: Any) -> Any:
        nonlocal passed
        if moment != "appear" or arguments[0].name == "dataset":
            passed += 1
            if passed > count:
                die()
        return original(*arguments, **options)

    patch.setattr(owner, name, function)


def records(directory: Path, split: str) -> list[Any]:
    """Returns the records of a split as protos, shard by shard, in order."""
    return [
        tf_example_pb2.Example.FromString(record)
        for path in shards(directory, split)
        for record in ArrayRecordReader(str(path)).read_all()
    ]


def shards(directory: Path, split: str) -> list[Path]:
    """Returns the ArrayRecord files of a split."""
    return sorted(path for path in directory.iterdir() if re.search(rf"-{split}\.array_record-", path.name))


def value(record: Any, feature: str) -> Any:
    """Returns the one value of a feature of a record."""
    values = record.features.feature[feature]
    return (values.bytes_list.value or values.int64_list.value)[0]


def contents(directory: Path) -> dict[str, bytes]:
    """Returns every file of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
