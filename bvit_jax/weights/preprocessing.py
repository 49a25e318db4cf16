"""From an image file to the input of a model: what evaluation does, and what travels with the weights."""

import dataclasses
import math
from dataclasses import dataclass

from bvit_jax.config.values import IMAGENET_MEAN, IMAGENET_STD

INTERPOLATIONS = ("bicubic", "bilinear")
MAX_SIZE = 1 << 16  # pixels
EVAL_CROP = 224 / 256  # share of the resized short side that the evaluation crop keeps


@dataclass(frozen=True)
class Preprocessing:
    """The steps between an image file and a model.

    Attributes:
      resize: length of the short side after resizing, in pixels.
      crop: side of the square that is cut out of the centre, in pixels: the model's image size.
      interpolation: "bicubic" or "bilinear".
      mean, std: per colour, for images in [0, 1].
      square: whether both sides are resized to ``resize``, ignoring the aspect ratio.

    Raises:
      ValueError: a value has the wrong type or is out of range.
    """

    resize: int
    crop: int
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    square: bool = False

    def __post_init__(self) -> None:
        sizes = (self.resize, self.crop)
        if not all(type(size) is int and 0 < size < MAX_SIZE for size in sizes):
            raise ValueError(f"resize and crop are {sizes}, expected whole numbers of pixels")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}, expected bicubic or bilinear")
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and all(type(v) in (int, float) for v in values)
            if not numbers or len(values) != 3 or not all(least < v < math.inf for v in values):
                raise ValueError(f"{name} is {values}, expected one number for each of three colours")
        if type(self.square) is not bool:
            raise ValueError(f"square is {self.square!r}, expected true or false")

    def scaled_to(self, image_size: int) -> "Preprocessing":
        """Returns the same preprocessing for another image size, in pixels; rounded down, as in timm."""
        return dataclasses.replace(self, resize=self.resize * image_size // self.crop, crop=image_size)


def deit_preprocessing(image_size: int) -> Preprocessing:
    """Returns what DeiT and BinaryViT evaluate with: 256 to 224 pixels, or in proportion to it."""
    return Preprocessing(resize=int(image_size / EVAL_CROP), crop=image_size)
