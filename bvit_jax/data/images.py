"""The one place where image files are opened: for training, preparation, prediction and reports.

Pillow knows more formats than are safe to open: for an EPS file, under any name, it starts Ghostscript.
Only those of `FORMATS` are read, up to `MAX_PIXELS`, and never clipped from more than 8 bits a colour.
"""

import io
from pathlib import Path

from PIL import Image, features

from bvit_jax.errors import UserError

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"),  # MPO is opened as JPEG
    *(["AVIF"] if "avif" in features.modules and features.check("avif") else []),
)
MAX_BYTES = 1 << 28  # of a file
MAX_PIXELS = 120_000_000  # half a gigabyte in RGB
MAX_ASPECT = 200  # the short side is resized to hundreds of pixels, and the long one with it
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(Exception):
    """The bytes are no image that can be used; the message says why, without a name."""


def read(path: Path) -> bytes:
    """Returns the bytes of an image file; raises `UserError` if it cannot be read or is too large."""
    try:
        if not path.is_file() and path.exists():
            raise UserError(f"{path} is not a regular file; expected an image")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes; expected an image of at most {MAX_BYTES:,}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError for a zero byte in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def check(encoded: bytes, formats: tuple[str, ...] = FORMATS) -> None:
    """Raises `ImageError` unless the header is that of an image that `decode` takes."""
    _opened(encoded, formats).close()  # decoding the pixels of ImageNet would take days


def decode(encoded: bytes, formats: tuple[str, ...] = FORMATS, *, upright: bool = False) -> Image.Image:
    """Returns the pixels of an image file in RGB.

    Args:
      encoded: the file.
      formats: those that it may have.
      upright: whether it is turned as its EXIF data say. Training does not, like torchvision.

    Raises:
      ImageError: it is damaged, of another format, too large, or has more than 8 bits a colour.
    """
    with _opened(encoded, formats) as image:
        try:
            image.load()
            return rgb(turned(image) if upright else image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plugins raise a dozen types for damaged files
            raise ImageError(_reason(error)) from error


def rgb(image: Image.Image) -> Image.Image:
    """Returns an image in RGB; raises `ImageError` if it cannot be one that transforms take."""
    _check_shape(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def turned(image: Image.Image) -> Image.Image:
    """Returns an image as the camera was held, or as it is where its EXIF data are missing or broken.

    Pillow's ``exif_transpose`` would also rewrite every other tag, and fails on unusual ones.
    """
    try:
        method = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever is wrong with them, the pixels are fine
        method = None
    return image if method is None else image.transpose(method)


def _opened(encoded: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded), formats=formats)
    except Exception as error:
        raise ImageError(_reason(error)) from error
    _check_shape(image)
    return image


def _check_shape(image: Image.Image) -> None:
    width, height = image.size
    if image.mode.startswith(("I", "F")):
        raise ImageError(f"it has {image.mode} pixels; convert it to 8 bits a colour")
    if not 0 < width * height <= MAX_PIXELS:
        raise ImageError(f"it has {width}×{height} pixels; expected at most {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"it has {width}×{height} pixels, which is too narrow")


def _reason(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return "it has the format of no known image"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS:,} pixels"
    return " ".join(str(error).split()) or type(error).__name__
