"""Classes of image files, as a model and its preprocessing see them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from bvit_jax import models
from bvit_jax.data import transforms
from bvit_jax.errors import UserError
from bvit_jax.training.steps.train import Normalization
from bvit_jax.weights.formats import Preprocessing
from bvit_jax.weights.pretrained import Pretrained

IMAGES_AT_ONCE = 8
MAX_ASPECT = 50  # the short side is resized to hundreds of pixels, and the long one with it


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    index: int
    name: str
    probability: float


def predict(model: Pretrained, paths: Sequence[Path], top: int = 5) -> Iterator[list[Guess]]:
    """Yields the ``top`` classes of each image file, the likeliest first.

    Raises:
      UserError: a file is missing or no image, or the model's answer is not finite.
    """
    module = models.create_model(model.config)
    normalize = Normalization(model.preprocessing.mean, model.preprocessing.std)

    @jax.jit
    def probabilities(variables: Any, images: jax.Array) -> jax.Array:
        output: Any = module.apply(variables, normalize(images))
        return jax.nn.softmax(output.logits)

    variables = jax.device_put(model.arrays())
    for start in range(0, len(paths), IMAGES_AT_ONCE):
        group = paths[start : start + IMAGES_AT_ONCE]
        images = jnp.stack([load_image(path, model.preprocessing) for path in group])
        for path, shares in zip(group, np.asarray(probabilities(variables, images)), strict=True):
            if not np.isfinite(shares).all():
                raise UserError(f"the model's answer for {path} is not finite; its weights are damaged")
            best = np.argsort(-shares, kind="stable")[:top]
            yield [Guess(int(i), model.class_names[i], float(shares[i])) for i in best]


def load_image(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """Returns an image file as a model's input before normalisation, uint8 (size, size, 3).

    Raises:
      UserError: the file is missing, damaged, or no image.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)  # as it was held: phones turn the picture only in name
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path} has {image.mode} pixels; convert it to 8 bits a colour")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise UserError(f"{path} is {image.width}×{image.height} pixels, too narrow to classify")
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; expected an image such as JPEG or PNG") from error
    return prepared(image, preprocessing)


def prepared(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Returns an RGB image as a model's input before normalisation, uint8 (size, size, 3)."""
    p = preprocessing
    if p.square:
        resized = image.resize((p.resize, p.resize), transforms.INTERPOLATIONS[p.interpolation])
        return np.asarray(transforms.centre_crop(resized, p.crop))
    return transforms.eval_transform(image, size=p.crop, resize=p.resize, interpolation=p.interpolation)
