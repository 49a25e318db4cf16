"""Transforms of Pillow images, bit-identical to torchvision's.

Boxes are ``(top, left, height, width)`` in pixels; images are RGB.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
RANDOM = "random"  # in place of an interpolation: one of them, drawn for each use
CROP_TRIES = 10

Box = tuple[int, int, int, int]
Range = tuple[float, float]
Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class ColorJitter:
    """Strengths of torchvision's ``ColorJitter``, each at least 0; 0 leaves a property alone.

    Brightness, contrast and saturation are multiplied by a factor between ``max(0, 1 - x)`` and
    ``1 + x``; hue, with x at most 0.5, is rotated by up to ``x`` of the circle in either direction.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


def random_resized_crop_box(
    rng: np.random.Generator, width: int, height: int, scale: Range, ratio: Range
) -> Box:
    """Draws the box of torchvision's ``RandomResizedCrop``.

    Args:
      rng: the only source of randomness.
      width: of the image, in pixels.
      height: of the image, in pixels.
      scale: smallest and largest share of the image's area.
      ratio: smallest and largest width / height, drawn uniformly in its logarithm.

    Returns:
      The box; if ten draws do not fit, the largest centred box within ``ratio``.
    """
    area = width * height
    log_ratio = np.log(ratio)
    for _ in range(CROP_TRIES):
        target_area = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width = round(math.sqrt(target_area * aspect))
        crop_height = round(math.sqrt(target_area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width, crop_height = width, height
    if width / height < min(ratio):
        crop_height = round(width / min(ratio))
    elif width / height > max(ratio):
        crop_width = round(height * max(ratio))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resized_crop(image: Image.Image, box: Box, size: int, interpolation: str) -> Image.Image:
    """Crops to ``box`` and resizes to ``size`` x ``size`` pixels."""
    top, left, height, width = box
    # resize(box=...) would take one pass, but its filter reads pixels outside the box.
    cropped = image.crop((left, top, left + width, top + height))
    return cropped.resize((size, size), INTERPOLATIONS[interpolation])


def resize_short_side(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """Resizes so that the short side has ``size`` pixels; the long side is rounded down."""
    width, height = image.size
    long_side = int(size * max(width, height) / min(width, height))
    new_size = (size, long_side) if width <= height else (long_side, size)
    return image if new_size == image.size else image.resize(new_size, INTERPOLATIONS[interpolation])


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crops to the central ``size`` x ``size`` pixels; a smaller image gets black borders."""
    width, height = image.size
    pad_x, pad_y = max(size - width, 0), max(size - height, 0)
    # Half of the border, rounded down, goes to the left and top; crop fills it with black.
    left = -(pad_x // 2) if pad_x else round((width - size) / 2)
    top = -(pad_y // 2) if pad_y else round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _change_brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _change_contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _change_saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def turn_hue(image: Image.Image, share: float) -> Image.Image:
    """Rotates the hue of an RGB image by ``share`` of the circle, in steps of 1/256."""
    hue, saturation, value = image.convert("HSV").split()
    steps = int(share * 255)  # torchvision uses 255, on a circle of 256
    hue = hue.point([(step + steps) % 256 for step in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def color_jitter(image: Image.Image, rng: np.random.Generator, *, strengths: ColorJitter) -> Image.Image:
    """Changes brightness, contrast, saturation and hue of an RGB image, in random order."""

    def range_around_one(strength: float) -> Range:
        return max(0.0, 1 - strength), 1 + strength

    changes: tuple[tuple[Callable[[Image.Image, float], Image.Image], Range], ...] = (
        (_change_brightness, range_around_one(strengths.brightness)),
        (_change_contrast, range_around_one(strengths.contrast)),
        (_change_saturation, range_around_one(strengths.saturation)),
        (turn_hue, (-strengths.hue, strengths.hue)),
    )
    for index in rng.permutation(len(changes)).tolist():
        change, (low, high) = changes[index]
        if low < high:
            image = change(image, rng.uniform(low, high))
    return image


def train_transform(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    size: int,
    scale: Range,
    ratio: Range,
    interpolation: str,
    flip: bool,
    augment: Augment | None = None,
) -> np.ndarray:
    """Applies a random resized crop, a horizontal flip with probability one half, then ``augment``.

    Returns:
      uint8 [size, size, 3].
    """
    box = random_resized_crop_box(rng, *image.size, scale, ratio)
    if interpolation == RANDOM:
        interpolation = str(rng.choice(sorted(INTERPOLATIONS)))
    image = resized_crop(image, box, size, interpolation)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image if augment is None else augment(image, rng))


def eval_transform(image: Image.Image, *, size: int, resize: int, interpolation: str) -> np.ndarray:
    """Resizes the short side to ``resize`` and crops the centre; returns uint8 [size, size, 3]."""
    return np.asarray(centre_crop(resize_short_side(image, resize, interpolation), size))
