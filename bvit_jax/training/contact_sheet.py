"""A picture of the images that a model is trained on, with their labels."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bvit_jax.training.steps.preview import Seen

COLUMNS = 8
MIN_TILE = 96  # pixels; smaller images are enlarged by an integer factor
TEXT = 12  # pixels
GAP = 4  # pixels


def draw(seen: Seen, class_names: Sequence[str] = ()) -> np.ndarray:
    """Returns a grid of eight images per row, each above its label and the label that was mixed into it.

    Args:
      seen: at least one image.
      class_names: shown instead of the class numbers, if there are any.

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
