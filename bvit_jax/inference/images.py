"""From an image, wherever it is, to a model's input."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from bvit_jax.data import images, transforms
from bvit_jax.errors import UserError
from bvit_jax.weights import Preprocessing

Picture = str | os.PathLike[str] | Image.Image | np.ndarray


def model_input(picture: Picture, preprocessing: Preprocessing) -> np.ndarray:
    """Returns an image as a model's input before normalization, uint8 ``[size, size, 3]``.

    Args:
      picture: the path of an image file, a PIL image, or uint8 ``[H, W, 3]``.
      preprocessing: of the model.

    Raises:
      UserError: the file is missing, damaged, or no image; or the pixels are no 8-bit colours.
    """
    if isinstance(picture, str | os.PathLike):
        return prepared(_opened(Path(picture)), preprocessing)
    if isinstance(picture, Image.Image):
        return prepared(_upright(picture), preprocessing)
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise UserError(
            f"an image is {array.dtype} {list(array.shape)}; expected uint8 [height, width, 3], a PIL image"
            " or a path"
        )
    return prepared(_upright(Image.fromarray(array)), preprocessing)


def label_of(picture: Picture, index: int) -> str:
    """Returns what an error calls an image: its path, or its number from 0."""
    return str(picture) if isinstance(picture, str | os.PathLike) else f"image {index}"


def prepared(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Returns an RGB image as a model's input before normalization, uint8 ``[size, size, 3]``."""
    p = preprocessing
    if p.square:
        resized = image.resize((p.resize, p.resize), transforms.INTERPOLATIONS[p.interpolation])
        return np.asarray(transforms.centre_crop(resized, p.crop))
    return transforms.eval_transform(image, size=p.crop, resize=p.resize, interpolation=p.interpolation)


def _opened(path: Path) -> Image.Image:
    try:
        return images.decode(images.read(path), upright=True)
    except images.ImageError as error:
        raise UserError(f"cannot use {path}: {error}; expected an image such as JPEG or PNG") from error


def _upright(image: Image.Image) -> Image.Image:
    """Returns an image in RGB, as the camera was held: phones only note how the picture is turned."""
    try:
        return images.rgb(images.turned(image))
    except images.ImageError as error:
        raise UserError(f"cannot use the image: {error}") from error
