"""Looks for copies among the drawings of ``icons`` and draws its page's picture.

    python docs/icons.py DATA_DIR

Two drawings of a class count as copies if their hashes differ in at most 12 of 1024 bits: the signs of the
differences between neighbouring pixels, across and down, of what is inside the frame, at 16x16 pixels. Prints
the sets that share at least a tenth of their drawings, which have to be on one side, and how many held-out
drawings have a copy among those to train on.
"""

import io
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from bvit_jax.data.prepare.icons.drawings import NAME, VERSION

SIDE, STEP = 16, 8  # of the hashed image; the least difference between grey values that counts
SAME_BITS = 12
SHARE, COUNT = 0.1, 10  # of copies that make a set another's
ROWS, COLUMNS, CELL = 9, 26, 68


def read(directory: Path, split: str) -> list[tuple[str, int, bytes]]:
    """Returns file name, label and encoded image of each record."""
    found = []
    for path in sorted(directory.glob(f"*-{split}.array_record-*")):
        for record in ArrayRecordReader(str(path)).read_all():
            values = tf_example_pb2.Example.FromString(record).features.feature
            name, image = (values[key].bytes_list.value[0] for key in ("file_name", "image"))
            found.append((name.decode(), values["label"].int64_list.value[0], image))
    return found


def hashed(encoded: bytes) -> np.ndarray | None:
    """Returns the bits of a drawing, None if it is empty."""
    image = Image.open(io.BytesIO(encoded)).convert("L")
    box = image.point(lambda value: 255 - value).getbbox()
    if box is None:
        return None
    framed = image.crop(box)
    across, down = (
        np.diff(np.asarray(framed.resize(size, Image.Resampling.LANCZOS)).astype(int), axis=axis)
        for size, axis in (((SIDE + 1, SIDE), 1), ((SIDE, SIDE + 1), 0))
    )
    signs = [sign * difference > STEP for difference in (across, down) for sign in (1, -1)]
    return np.concatenate([bits.ravel() for bits in signs]).astype(np.float32)


def copies(drawings: list[tuple[str, int, bytes]]) -> dict[str, set[str]]:
    """Returns the copies of each drawing in other sets."""
    by_label: dict[int, list[tuple[str, np.ndarray]]] = defaultdict(list)
    for name, label, image in drawings:
        bits = hashed(image)
        if bits is not None:
            by_label[label].append((name, bits))
    found: dict[str, set[str]] = defaultdict(set)
    for members in by_label.values():
        names = [name for name, _ in members]
        bits = np.stack([value for _, value in members])
        ones = bits.sum(1)
        near = ones[:, None] + ones - 2 * bits @ bits.T <= SAME_BITS
        for i, j in zip(*np.nonzero(near), strict=True):
            if _set(names[i]) != _set(names[j]):
                found[names[i]].add(names[j])
    return found


def draw(drawings: list[tuple[str, int, bytes]], path: Path) -> None:
    """Writes a picture with a drawing of each class."""
    sheet = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), "white")
    rng = np.random.default_rng(0)
    by_label: dict[int, list[bytes]] = defaultdict(list)
    for _, label, image in drawings:
        by_label[label].append(image)
    for place, label in enumerate(sorted(by_label)[: ROWS * COLUMNS]):
        image = by_label[label][rng.integers(len(by_label[label]))]
        left, top = place % COLUMNS * CELL, place // COLUMNS * CELL
        sheet.paste(Image.open(io.BytesIO(image)).convert("RGB"), (left + 2, top + 2))
    sheet.quantize(64).save(path, optimize=True)


def main(data_dir: str) -> None:
    """Prints what is found."""
    directory = Path(data_dir) / NAME / VERSION
    info = tfds.builder_from_directory(directory).info
    train, test = read(directory, "train"), read(directory, "test")
    print(f"{len(train)} and {len(test)} drawings of {info.features['label'].num_classes} classes")
    found = copies(train + test)
    sizes = Counter(_set(name) for name, _, _ in train + test)
    pairs = Counter((_set(name), other) for name, near in found.items() for other in {_set(x) for x in near})
    for (one, other), count in pairs.most_common():
        if count >= max(COUNT, SHARE * sizes[one]):
            print(f"{one}: {count} of {sizes[one]} drawings are in {other}")
    seen = {name for name, _, _ in train}
    copied = sum(bool(found.get(name, set()) & seen) for name, _, _ in test)
    print(f"{copied} of {len(test)} held-out drawings have a copy to train on")
    draw(train, Path(__file__).parent / "images" / "icons.png")


def _set(name: str) -> str:
    return name.partition("/")[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
