"""A small generated ImageNet for rehearsals: ``python -m bvit_jax.data.mini_imagenet --out DIR``

Writes the two tars of ILSVRC 2012 with the official names of files, synsets and images, but few and small
images: stripes whose colour, direction and width depend on the class, so that a model can learn them. Some
are grey, and images that are CMYK or PNG files in the real dataset are so here. The same arguments give the
same images.
"""

import argparse
import colorsys
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bvit_jax.data.prepare.imagenet import TRAIN_TAR, VAL_TAR, tfds_info, validation_labels
from bvit_jax.data.prepare.tfds_internals import CMYK_IMAGES, PNG_IMAGES
from bvit_jax.errors import UserError
from bvit_jax.files import local_path

SIDES = (48, 129)  # range of the sides in pixels, the end excluded
GREY_EVERY = 20
NOISE = 12.0


def generate(out: Path, train_per_class: int = 2, validation: int = 500, seed: int = 0) -> dict[str, int]:
    """Writes both tars to the directory ``out`` and returns the number of images per split.

    Raises:
      UserError: a number is out of range, the tars exist, or they cannot be written.
    """
    labels = validation_labels()
    if train_per_class < 1:
        raise UserError(f"--train_per_class is {train_per_class}; expected at least 1")
    if not 1 <= validation <= len(labels):
        raise UserError(f"--validation is {validation}; expected 1 to {len(labels):,}")
    for name in (TRAIN_TAR, VAL_TAR):
        if (out / name).exists():
            raise UserError(f"{out / name} exists; delete it or choose another --out")
    synsets = tfds_info(out).features["label"].names
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_tar(out / TRAIN_TAR, _synset_tars(synsets, train_per_class, seed))
        _write_tar(out / VAL_TAR, _validation_images(synsets, validation, seed))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; make room or choose another --out") from error
    return {"train": train_per_class * len(synsets), "validation": validation}


def class_image(label: int, rng: np.random.Generator) -> Image.Image:
    """Draws an RGB image of the class ``label``, 0 to 999, whose digits are hue, direction and width."""
    hue, direction, width = label % 10, label // 10 % 10, label // 100
    columns, rows = rng.integers(*SIDES, size=2)
    angle = np.pi * (direction + rng.uniform(-0.2, 0.2)) / 10
    frequency = 2 * np.pi / (4.0 * 1.25 ** (width + rng.uniform(-0.2, 0.2)))
    x, y = np.arange(columns)[None, :], np.arange(rows)[:, None]
    phase = frequency * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi)
    stripes = 0.5 + 0.5 * np.sin(phase)[..., None]
    colour = np.array(colorsys.hsv_to_rgb(hue / 10 + rng.uniform(-0.02, 0.02), 0.9, 1.0))
    pixels = 255 * stripes * colour + NOISE * rng.standard_normal((rows, columns, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _synset_tars(synsets: list[str], per_class: int, seed: int) -> Iterator[tuple[str, bytes]]:
    special = [*CMYK_IMAGES, *PNG_IMAGES]
    for label, synset in enumerate(synsets):
        names = [name for name in special if name.startswith(synset)]
        names += [f"{synset}_{i}.JPEG" for i in range(1, per_class + 1)]
        names = list(dict.fromkeys(names))[:per_class]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for i, name in enumerate(names):
                rng = np.random.default_rng([seed, 0, label, i])
                _add(tar, name, _encode(class_image(label, rng), name, label * per_class + i))
        yield f"{synset}.tar", buffer.getvalue()


def _validation_images(synsets: list[str], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    for i, (name, synset) in zip(range(count), validation_labels().items()):
        image = class_image(synsets.index(synset), np.random.default_rng([seed, 1, i]))
        yield name, _encode(image, name, i)


def _encode(image: Image.Image, name: str, number: int) -> bytes:
    kind, mode = "JPEG", image.mode
    if name in PNG_IMAGES:
        kind = "PNG"
    elif name in CMYK_IMAGES:
        mode = "CMYK"
    elif number % GREY_EVERY == GREY_EVERY - 1:
        mode = "L"
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, quality=85)
    return buffer.getvalue()


def _write_tar(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    temporary = path.with_suffix(".tmp")
    with tarfile.open(temporary, "w") as tar:
        for name, data in files:
            _add(tar, name, data)
    temporary.replace(path)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bvit_jax.data.mini_imagenet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=local_path, required=True, metavar="DIR", help="directory for the tars")
    parser.add_argument(
        "--train_per_class", type=int, default=2, metavar="N", help="images per class, default 2"
    )
    parser.add_argument("--validation", type=int, default=500, metavar="N", help="images, default 500")
    parser.add_argument("--seed", type=int, default=0)
    try:
        arguments = parser.parse_args(argv)
        counts = generate(arguments.out, arguments.train_per_class, arguments.validation, arguments.seed)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    expect = ",".join(f"{name}={count}" for name, count in counts.items())
    print(
        f"wrote {arguments.out / TRAIN_TAR} and {arguments.out / VAL_TAR}; prepare them with\n"
        f"python -m bvit_jax.data.prepare imagenet2012 --tars {arguments.out} --expect {expect}"
        " --data_dir DIR"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
