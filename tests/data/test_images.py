"""Image files as strangers make them: other formats, other depths, broken headers and EXIF data."""

import contextlib
import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bvit_jax.data import images
from bvit_jax.errors import UserError

SEEDS = 300


def encoded(kind: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(kind: str, *tags: tuple[int, object]) -> bytes:
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    for tag, value in tags:
        exif[tag] = value
    return encoded(kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_formats_that_are_read(kind: str) -> None:
    image = images.decode(encoded(kind))
    assert (image.mode, image.size) == ("RGB", (20, 12))


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "SGI", "DDS", "PDF"])
def test_no_other_format_is_opened_so_that_nothing_starts_ghostscript(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(kind)
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    for function in (images.decode, images.check):
        with pytest.raises(images.ImageError, match="the format of no known image"):
            function(content)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF"), (np.float32, "TIFF")]
)
def test_more_than_eight_bits_are_not_clipped(dtype: type, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(1000, 60000, 64).reshape(8, 8).astype(dtype)).save(buffer, kind)
    for function in (images.decode, images.check):
        with pytest.raises(images.ImageError, match="convert it to 8 bits a colour"):
            function(buffer.getvalue())


def test_sizes_have_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = encoded("PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 239)
    with pytest.raises(images.ImageError, match="it has 20×12 pixels; expected at most 239"):
        images.check(content)
    (tmp_path / "x.png").write_bytes(content)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"x\.png has .* bytes; expected an image of at most 100"):
        images.read(tmp_path / "x.png")


def with_raw_tag(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """Returns a JPEG file whose EXIF data turn it, and have one more tag that Pillow would not write."""
    tags = [(images.ORIENTATION, 3, 1, b"\x06\0\0\0"), (tag, kind, count, value)]
    entries = b"".join(struct.pack("<HHI4s", *entry) for entry in tags)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    jpeg = encoded("JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


@pytest.mark.parametrize(
    "tag", [(0x11A, 7, 4, b"abcd"), (0x10F, 3, 1, b"\x05"), (0x128, 2, 4, b"abc"), (0x132, 5, 1, b"\x08")]
)
@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_an_unusual_tag_does_not_keep_a_photograph_from_being_turned(tag: tuple[Any, ...]) -> None:
    content = with_raw_tag(*tag)
    np.testing.assert_array_equal(
        images.decode(content, upright=True),
        images.decode(content).transpose(Image.Transpose.ROTATE_270),
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "JPEG2000"])
def test_random_damage_gives_pixels_or_one_reason(kind: str) -> None:
    tags = [(0x11A, 72.0), (0x10F, "maker"), (0x132, "2026:01:01 00:00:00")]
    whole = with_orientation(kind, *tags) if kind in ("JPEG", "PNG", "WEBP") else encoded(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(SEEDS // 6 if kind == "JPEG2000" else SEEDS):
            rng = np.random.default_rng(seed)
            damaged = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 300), rng.integers(1, 6)):
                damaged[place] = rng.integers(0, 256)
            content = bytes(damaged[: rng.integers(1, len(whole))] if seed % 4 == 0 else damaged)
            with contextlib.suppress(images.ImageError):
                assert images.decode(content, upright=True).mode == "RGB"
