"""What all file formats share: what was read, and what is known after reading it."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bvit_jax.config import IMAGENET_MEAN, IMAGENET_STD
from bvit_jax.errors import UserError

if TYPE_CHECKING:
    from bvit_jax.weights.document import Document

INTERPOLATIONS = ("bicubic", "bilinear")
MAX_SIZE = 1 << 16  # pixels
EVAL_CROP = 224 / 256  # share of the resized short side that the evaluation crop keeps


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the input of a model.

    Attributes:
      resize: length of the short side after resizing, in pixels.
      crop: side of the square that is cut out of the centre, in pixels: the model's image size.
      interpolation: "bicubic" or "bilinear".
      mean, std: of each colour, of images in [0, 1].
      square: both sides are resized to ``resize``, whatever the aspect.

    Raises:
      ValueError: a value is of another kind or out of range.
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
                raise ValueError(f"{name} is {values}, expected a number for each of three colours")
        if type(self.square) is not bool:
            raise ValueError(f"square is {self.square!r}, expected true or false")

    def scaled_to(self, image_size: int) -> "Preprocessing":
        """Returns the same for another image size."""
        resize = round(self.resize * image_size / self.crop)
        return dataclasses.replace(self, resize=resize, crop=image_size)


ASSUMED_PREPROCESSING = "preprocessing as for DeiT (256 to 224 pixels, bicubic, ImageNet's colours)"


def deit_preprocessing(image_size: int) -> Preprocessing:
    """Returns what DeiT and BinaryViT evaluate with: 256 to 224 pixels and in proportion."""
    return Preprocessing(resize=int(image_size / EVAL_CROP), crop=image_size)


@dataclass(frozen=True)
class RawCheckpoint:
    """What the files say, before anyone understood it.

    Attributes:
      state: the arrays by their names in the files.
      values: a configuration in the format's own terms, such as its ``config.json``; empty if none.
      args: what the training script was called with; empty if unknown.
      processor: Hugging Face's ``preprocessor_config.json``; empty if none.
      document: what this project wrote about the model; None in other people's files.
      files: the files of the arrays.
      origin: what messages call it.
    """

    state: Mapping[str, np.ndarray]
    values: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    document: "Document | None" = None
    files: tuple[Path, ...] = ()
    origin: str = ""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an array; raises `UserError` if there is none of that name."""
        if name not in self.state:
            raise UserError(f"{self.origin} has no array {name!r}{_close_to(name, self.state)}")
        return self.state[name].shape

    def count(self, before: str) -> int:
        """Returns how many numbered parts there are: one more than the highest number after ``before``."""
        pattern = re.compile(re.escape(before) + r"(\d+)\.")
        numbers = [int(match[1]) for name in self.state if (match := pattern.match(name))]
        return max(numbers, default=-1) + 1


def _close_to(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"; the nearest is {close[0]!r}" if close else ""


@dataclass(frozen=True)
class Understood:
    """The model that a raw checkpoint holds.

    Attributes:
      model: its name here.
      settings: those of its settings that the files determine.
      preprocessing: what its images go through.
      class_names: empty if the files do not say.
      assumed: settings that the files do not determine, in words.
    """

    model: str
    settings: dict[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


def square_side(tokens: int, origin: str) -> int:
    """Returns the side of a square grid of tokens; raises `UserError` if it is not square."""
    side = round(max(tokens, 0) ** 0.5)
    if side * side != tokens or side == 0:
        raise UserError(f"{origin} has position embeddings of {tokens} patches, which is no square grid")
    return side


def check_epsilon(who: str, epsilon: float, config: Mapping[str, Any]) -> None:
    """Raises `UserError` if a model's epsilon is not the one that others compute with."""
    if config["norm_epsilon"] != epsilon:
        raise UserError(
            f"norm_epsilon is {config['norm_epsilon']}, and {who} computes with {epsilon} whatever its files"
            f" say; use another format, or accept the difference with norm_epsilon={epsilon}"
        )
