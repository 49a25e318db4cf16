"""ImageNet (ILSVRC 2012) from its two official tars: the data set ``imagenet2012`` of TFDS.

Features, keys, labels and order are those of TFDS's own builder, which needs TensorFlow to open the tars
and to re-encode the 23 images that are not RGB or grey JPEG files; here Pillow does the latter.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import tensorflow_datasets as tfds

from bvit_jax.data import images
from bvit_jax.data.prepare.source import ARRAY_RECORD, Example, Part, Source, SplitSource, check_image, stamp
from bvit_jax.data.prepare.tars import Member, list_members, open_tar, read_member
from bvit_jax.data.prepare.tfds_internals import CMYK_IMAGES, PNG_IMAGES, ImageNetBuilder
from bvit_jax.data.progress import ProgressBar
from bvit_jax.errors import UserError, nearest

NAME = "imagenet2012"
TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
COUNTS = {"train": 1_281_167, "validation": 50_000}
SIZES = {TRAIN_TAR: 147_897_477_120, VAL_TAR: 6_744_924_160}
MD5 = {TRAIN_TAR: "1d675b47d978889d74fa0da5fadfb00e", VAL_TAR: "29b22e2961454d5413ddabcf34fc5622"}

TO_RGB = frozenset([*CMYK_IMAGES, *PNG_IMAGES])
VAL_NAME = "ILSVRC2012_val_{:08d}.JPEG"  # numbered from 1
VAL_PART = 1000  # images
HASH_CHUNK = 1 << 24


def imagenet_source(
    tars: Path, data_dir: Path, counts: Mapping[str, int] | None = None, verify_md5: bool = False
) -> Source:
    """Checks the two tars and returns them as the source of ``imagenet2012``.

    Args:
      tars: the directory of the two files.
      data_dir: the TFDS directory to prepare in.
      counts: number of images of ``train`` and ``validation``; None for the official ones, where the
        sizes of the files are checked too.
      verify_md5: whether to read both files first and compare their MD5 sums with the official ones.

    Raises:
      UserError: a tar is missing, has the wrong size or sum, is truncated or holds the wrong files.
    """
    if counts is None:
        for name, size in SIZES.items():
            _check_size(tars / name, size)
    if verify_md5:
        for name, expected in MD5.items():
            _check_md5(tars / name, expected)
    counts = counts or COUNTS
    info = tfds_info(data_dir)
    synsets = info.features["label"].names
    train_tar, val_tar = tars / TRAIN_TAR, tars / VAL_TAR
    train = _synset_tars(train_tar, synsets)
    val = _val_images(val_tar, counts["validation"])
    val_labels = validation_labels()
    splits = (
        SplitSource(
            name="train",
            num_examples=counts["train"],
            num_bytes=sum(member.size for member in train),
            parts=tuple(
                Part(f"{train_tar}: {tar.name}", partial(_synset_examples, train_tar, tar)) for tar in train
            ),
        ),
        SplitSource(
            name="validation",
            num_examples=len(val),
            num_bytes=sum(member.size for member in val),
            parts=tuple(
                Part(str(val_tar), partial(_val_examples, val_tar, val[i : i + VAL_PART], val_labels))
                for i in range(0, len(val), VAL_PART)
            ),
        ),
    )
    return Source(info, splits, fingerprint=repr((counts, stamp(train_tar), stamp(val_tar))))


def tfds_info(data_dir: Path) -> tfds.core.DatasetInfo:
    """Returns TFDS's description of ``imagenet2012``."""
    return ImageNetBuilder(data_dir=data_dir, file_format=ARRAY_RECORD).info


def validation_labels() -> dict[str, str]:
    """Returns the synset of every validation image, by file name."""
    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    lines = path.read_text().split()
    return {VAL_NAME.format(number): label for number, label in enumerate(lines, 1)}


def to_rgb_jpeg(encoded: bytes) -> bytes:
    """Re-encodes an image as RGB JPEG with the settings of TensorFlow's ``encode_jpeg``, quality 100."""
    buffer = io.BytesIO()
    images.decode(encoded).save(buffer, "JPEG", quality=100, subsampling="4:2:0", dpi=(300, 300))
    return buffer.getvalue()


def _synset_tars(path: Path, synsets: Sequence[str]) -> list[Member]:
    with open_tar(path) as file:
        members = list(list_members(file, str(path)))
    names = [member.name for member in members]
    known = {f"{synset}.tar" for synset in synsets}
    for name in names:
        if name not in known:
            raise UserError(
                f"{path} holds {name}, which is not one of the 1,000 synsets of ImageNet"
                f"{nearest(name, known) if len(name) == len('n01440764.tar') else ''}; get it again"
            )
        if names.count(name) > 1:
            raise UserError(f"{path} holds {name} twice; get it again")
    missing = sorted(known - set(names))
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the 1,000 synsets, such as {', '.join(missing[:3])}; "
            "get it again"
        )
    return members


def _synset_examples(path: Path, tar: Member) -> Iterator[tuple[str, Example]]:
    synset = tar.name.removesuffix(".tar")
    seen = set()
    with open_tar(path) as file:
        for member in list_members(file, f"{path}: {tar.name}", tar.offset, tar.offset + tar.size):
            name = f"{path}: {tar.name}: {member.name}"
            if not re.fullmatch(rf"{synset}_\d+\.JPEG", member.name):
                raise UserError(f"{name} is not named like an image of {synset}, {synset}_<number>.JPEG")
            if member.name in seen:
                raise UserError(f"{name} appears twice; get that tar again")
            seen.add(member.name)
            encoded = _image(read_member(file, member), member.name, name)
            yield member.name, {"image": encoded, "label": synset, "file_name": member.name}


def _val_images(path: Path, count: int) -> list[Member]:
    with open_tar(path) as file:
        members = list(list_members(file, str(path)))
    names = {member.name for member in members}
    expected = {VAL_NAME.format(number) for number in range(1, count + 1)}
    for what, wrong in [("lacks", expected - names), ("should not hold", names - expected)]:
        if wrong:
            raise UserError(
                f"{path} {what} {len(wrong):,} file(s), such as {min(wrong)}; expected the {count:,} images"
                f" {min(expected)} to {max(expected)}"
            )
    if len(members) > count:
        raise UserError(f"{path} holds some of its images twice; get it again")
    return members


def _val_examples(
    path: Path, members: Sequence[Member], labels: Mapping[str, str]
) -> Iterator[tuple[str, Example]]:
    with open_tar(path) as file:
        for member in members:
            encoded = _image(read_member(file, member), member.name, f"{path}: {member.name}")
            yield member.name, {"image": encoded, "label": labels[member.name], "file_name": member.name}


def _image(encoded: bytes, file_name: str, name: str) -> bytes:
    if file_name not in TO_RGB:
        check_image(encoded, name, ("JPEG",))
        return encoded
    check_image(encoded, name, ("JPEG", "PNG"))
    try:
        return to_rgb_jpeg(encoded)
    except images.ImageError as error:
        raise UserError(f"{name} is damaged: {error}; get that file again") from error


def _check_size(path: Path, expected: int) -> None:
    with open_tar(path) as file:
        size = file.seek(0, 2)
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes; expected {expected:,}: "
            + ("the download is incomplete" if size < expected else "it is a different file")
            + "; get it again, or pass --expect if it is not the official one"
        )


def _check_md5(path: Path, expected: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with (
        open_tar(path) as file,
        ProgressBar(f"MD5 of {path.name}, in MB", path.stat().st_size // 10**6) as bar,
    ):
        done = 0
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
            bar.advance((done + len(chunk)) // 10**6 - done // 10**6)
            done += len(chunk)
    if digest.hexdigest() != expected:
        raise UserError(f"{path} has the MD5 sum {digest.hexdigest()}; expected {expected}; get it again")
