"""Pictures of the images that a model is trained on, as it sees them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh
from PIL import Image, ImageDraw, ImageFont

from bvit_jax.augment.augmentation import NO_AUGMENTATION, Augmentation
from bvit_jax.augment.normalization import Normalization
from bvit_jax.runtime.mesh import batch_sharded, replicated
from bvit_jax.training.steps.train import step_keys

COLUMNS = 8
MIN_TILE = 96  # pixels; smaller images are enlarged by a whole factor
TEXT = 12  # pixels
GAP = 4  # pixels


@struct.dataclass
class Seen:
    """The first images of a batch as the model sees them.

    Attributes:
      images: uint8 [n, H, W, 3].
      labels: int32 [n].
      partners: the labels that were mixed in, int32 [n].
      shares: of an image's own label, float32 [n]; 1 where nothing was mixed in.
    """

    images: Array
    labels: Array
    partners: Array
    shares: Array


Look = Callable[[Mapping[str, Array], Array | int, Array], Seen]


def make_look(
    normalize: Normalization, *, augmentation: Augmentation = NO_AUGMENTATION, count: int = 4 * COLUMNS
) -> Look:
    """Returns the pure function that shows what a step makes of its batch.

    It takes the batch of ``image`` (uint8) and ``label`` (int32), the number of steps taken before, and
    the key of the run, and returns the first ``count`` images, or all. They are augmented and normalised
    as in the step, and brought back to the scale from 0 to 255; what erasing put beyond it is cut off.
    """

    def look(batch: Mapping[str, Array], step: Array | int, key: Array) -> Seen:
        labels = batch["label"]
        pictures, lam = augmentation(step_keys(key, step)[1], batch["image"], normalize)
        restored = normalize.inverse(normalize(pictures)[:count])
        shares = jnp.ones(labels.shape, jnp.float32) * (1 if lam is None else lam)
        return Seen(
            images=jnp.clip(jnp.round(restored), 0, 255).astype(jnp.uint8),
            labels=labels[:count],
            partners=labels[::-1][:count],
            shares=shares[:count],
        )

    return look


def jit_look(look: Look, mesh: Mesh) -> Any:
    """Compiles the function of `make_look` for a mesh; every process gets all of the images."""
    whole = replicated(mesh)
    return jax.jit(look, in_shardings=(batch_sharded(mesh), whole, whole), out_shardings=whole)


def draw(seen: Seen, class_names: Sequence[str] = ()) -> np.ndarray:
    """Returns a grid of eight images a row, each above its label and the one that was mixed into it.

    Args:
      seen: at least one image.
      class_names: in place of the numbers of the classes, where there are any.

    Returns:
      uint8 [height, width, 3].
    """
    images, labels, partners, shares = jax.device_get((seen.images, seen.labels, seen.partners, seen.shares))
    captions = [_caption(*of_one, class_names) for of_one in zip(labels, partners, shares, strict=True)]
    lines = max(map(len, captions))
    factor = -(-MIN_TILE // images.shape[2])
    height, width = (factor * side for side in images.shape[1:3])
    rows, columns = -(-len(images) // COLUMNS), min(COLUMNS, len(images))
    step_y, step_x = height + lines * (TEXT + 2) + GAP, width + GAP
    grid = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(TEXT)
    for i, (image, caption) in enumerate(zip(images, captions)):
        row, column = divmod(i, COLUMNS)
        x, y = column * step_x + GAP, row * step_y + GAP
        grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for k, text in enumerate(caption):
            fitting = _shortened(text, font, width)
            pen.text((x, y + height + k * (TEXT + 2)), fitting, fill="black", font=font)
    return np.asarray(grid)


def _caption(label: int, partner: int, share: float, class_names: Sequence[str]) -> list[str]:
    """Returns a line for every label that an image has a share of."""
    names = [class_names[i] if class_names else str(i) for i in (label, partner)]
    if share == 1 or label == partner:
        return names[:1]
    return [f"{round(100 * x)} % {name}" for x, name in zip((share, 1 - share), names, strict=True)]


def _shortened(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
