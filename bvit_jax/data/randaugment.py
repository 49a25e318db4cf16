"""RandAugment (Cubuk et al., 2019) with timm's operations, ranges and signs, on Pillow images.

A policy is a string such as ``rand-m9-mstd0.5-inc1``, in timm's notation (``timm/data/auto_augment.py``).
One that begins with ``draw`` is for drawings on white: it moves them, changes their strokes and inverts them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from bvit_jax.errors import UserError, nearest

MAX_MAGNITUDE = 10  # the magnitude whose level is 1
SOLARIZE_ADD_BELOW = 128
UNIFORM_ABOVE = 100.0  # a larger mstd means a uniform magnitude, from 0 to m


@dataclass(frozen=True)
class Canvas:
    """How a warp interpolates, and the colour with which it fills what is outside the image."""

    resample: Image.Resampling
    fill: tuple[int, ...]


Apply = Callable[[Image.Image, float, Canvas], Image.Image]


@dataclass(frozen=True)
class Operation:
    """One row of `OPERATIONS`.

    Attributes:
      apply: returns the new image, given an image, a strength and a canvas.
      strength: converts a level, which is the magnitude divided by 10, to a strength.
      signed: whether the level is negative with probability one half.
    """

    apply: Apply
    strength: Callable[[float], float]
    signed: bool = False


@dataclass(frozen=True)
class Policy:
    """A parsed policy; its notation in the string is in brackets.

    Attributes:
      operations: names in `OPERATIONS`, drawn with equal probability and with replacement.
      weights: if not empty, their probabilities; they are then drawn without replacement.
      magnitude: mean magnitude, 10 for a level of 1 [m].
      magnitude_std: standard deviation of the magnitude; infinity: uniform up to the mean [mstd].
      magnitude_max: upper limit of the magnitude [mmax].
      count: operations drawn per image [n].
      prob: probability that a drawn operation is applied [p].
      fill: colour outside a warped image, 0 to 255; None: that of the run.
    """

    operations: tuple[str, ...]
    weights: tuple[float, ...] = ()
    magnitude: int = MAX_MAGNITUDE
    magnitude_std: float = 0.0
    magnitude_max: int = MAX_MAGNITUDE
    count: int = 2
    prob: float = 0.5
    fill: tuple[int, ...] | None = None


def _affine(coefficients: Callable[[Image.Image, float], tuple[float, ...]]) -> Apply:
    def apply(image: Image.Image, strength: float, canvas: Canvas) -> Image.Image:
        matrix = coefficients(image, strength)
        method = Image.Transform.AFFINE
        return image.transform(image.size, method, matrix, resample=canvas.resample, fillcolor=canvas.fill)

    return apply


def _rotate(image: Image.Image, degrees: float, canvas: Canvas) -> Image.Image:
    return image.rotate(degrees, resample=canvas.resample, fillcolor=canvas.fill)


def _posterize(image: Image.Image, bits: float, canvas: Canvas) -> Image.Image:
    # ImageOps.posterize rejects 0 bits since Pillow 13; earlier, and for timm, they mean black.
    dropped = max(0, 8 - int(bits))
    return image.point([value >> dropped << dropped for value in range(256)] * 3)


def _solarize(image: Image.Image, threshold: float, canvas: Canvas) -> Image.Image:
    return ImageOps.solarize(image, int(threshold))


def _solarize_add(image: Image.Image, add: float, canvas: Canvas) -> Image.Image:
    table = [min(255, value + int(add)) if value < SOLARIZE_ADD_BELOW else value for value in range(256)]
    return image.point(table * 3)


def _stroke(image: Image.Image, strength: float, canvas: Canvas) -> Image.Image:
    wider = ImageFilter.MinFilter(3) if strength > 0 else ImageFilter.MaxFilter(3)
    return Image.blend(image, image.filter(wider), min(1.0, abs(strength)))


def _without_strength(change: Callable[[Image.Image], Image.Image]) -> Operation:
    return Operation(lambda image, strength, canvas: change(image), lambda level: 0.0)


def _enhance(enhancer: Any) -> Operation:
    # From 0.1 to 1.9, where 1 changes nothing.
    return Operation(
        lambda image, factor, _: enhancer(image).enhance(factor), lambda level: level * 1.8 + 0.1
    )


def _enhance_around_one(enhancer: Any) -> Operation:
    return replace(_enhance(enhancer), strength=lambda level: max(0.1, 1.0 + level * 0.9), signed=True)


def _bits(level: float) -> float:
    return int(level * 4)


def _threshold(level: float) -> float:
    return min(256, int(level * 256))


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _without_strength(ImageOps.autocontrast),
    "Equalize": _without_strength(ImageOps.equalize),
    "Invert": _without_strength(ImageOps.invert),
    "Rotate": Operation(_rotate, lambda level: 30.0 * level, signed=True),
    "Posterize": Operation(_posterize, _bits),
    "PosterizeIncreasing": Operation(_posterize, lambda level: 4 - _bits(level)),
    "Solarize": Operation(_solarize, _threshold),
    "SolarizeIncreasing": Operation(_solarize, lambda level: 256 - _threshold(level)),
    "SolarizeAdd": Operation(_solarize_add, lambda level: min(128, int(level * 110))),
    "Color": _enhance(ImageEnhance.Color),
    "ColorIncreasing": _enhance_around_one(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "ContrastIncreasing": _enhance_around_one(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "BrightnessIncreasing": _enhance_around_one(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "SharpnessIncreasing": _enhance_around_one(ImageEnhance.Sharpness),
    "ShearX": Operation(_affine(lambda _, x: (1, x, 0, 0, 1, 0)), lambda level: 0.3 * level, signed=True),
    "ShearY": Operation(_affine(lambda _, x: (1, 0, 0, x, 1, 0)), lambda level: 0.3 * level, signed=True),
    "TranslateXRel": Operation(
        _affine(lambda image, x: (1, 0, x * image.width, 0, 1, 0)), lambda level: 0.45 * level, signed=True
    ),
    "TranslateYRel": Operation(
        _affine(lambda image, x: (1, 0, 0, 0, 1, x * image.height)), lambda level: 0.45 * level, signed=True
    ),
    # Makes dark lines up to a pixel wider on each side, or narrower; not one of timm's.
    "Stroke": Operation(_stroke, lambda level: level, signed=True),
}

DRAWING = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Stroke", "Invert")
WHITE = (255, 255, 255)

# Without inc, and with inc1, for which a larger magnitude always changes the image more.
OF_TIMM = tuple(name for name in OPERATIONS if name != "Stroke")
PLAIN = tuple(name for name in OF_TIMM if not name.endswith("Increasing"))
INCREASING = tuple(
    name for name in OF_TIMM if name.endswith("Increasing") or f"{name}Increasing" not in OPERATIONS
)

# timm's tweights.
WEIGHTS = {
    "Rotate": 3.0,
    "ShearX": 2.0,
    "ShearY": 2.0,
    "TranslateXRel": 1.0,
    "TranslateYRel": 1.0,
    "AutoContrast": 0.25,
    "ColorIncreasing": 0.25,
    "SharpnessIncreasing": 0.25,
    "BrightnessIncreasing": 0.05,
    "ContrastIncreasing": 0.05,
    "Equalize": 0.05,
    "Invert": 0.05,
    "PosterizeIncreasing": 0.05,
    "SolarizeAdd": 0.05,
    "SolarizeIncreasing": 0.05,
}


def parse_policy(text: str) -> Policy:
    """Parses a policy such as ``rand-m9-mstd0.5-inc1`` or ``draw-m5-mstd2``.

    After ``rand`` or ``draw``, in any order: ``m`` magnitude (10), ``mstd`` its standard deviation (0),
    ``mmax`` its limit (10), ``n`` operations per image (2), ``p`` probability of each (0.5); after ``rand``
    also ``inc1`` for the increasing operations, ``tweights`` for timm's weighted choice of them.

    Raises:
      UserError: a part is unknown, lacks its number or has one out of range; names the part.
    """
    first, *parts = text.split("-")
    if first not in ("rand", "draw"):
        raise UserError(
            f"config.data.auto_augment is {text!r}; expected '', 'rand-m9-mstd0.5-inc1' or such as 'draw-m5'"
        )
    drawings = first == "draw"
    settings: dict[str, Any] = {"fill": WHITE} if drawings else {}
    operations: tuple[str, ...] = DRAWING if drawings else PLAIN
    weights: tuple[float, ...] = ()
    for part in parts:
        name, number = _name_and_number(text, part)
        if drawings and name in ("inc", "tweights"):
            raise UserError(f"config.data.auto_augment is {text!r}; {part!r} is for a policy of 'rand'")
        match name:
            case "tweights":
                operations, total = tuple(WEIGHTS), sum(WEIGHTS.values())
                weights = tuple(weight / total for weight in WEIGHTS.values())
            case "inc":
                operations = INCREASING if number and not weights else operations
            case "mstd":
                settings["magnitude_std"] = number if number <= UNIFORM_ABOVE else float("inf")
            case "p":
                settings["prob"] = number
            case _:
                settings[{"m": "magnitude", "mmax": "magnitude_max", "n": "count"}[name]] = int(number)
    return Policy(operations=operations, weights=weights, **settings)


NUMBER_RANGES = {
    "m": (0.0, float("inf")),
    "mstd": (0.0, float("inf")),
    "mmax": (1.0, float("inf")),
    "n": (1.0, len(WEIGHTS)),
    "p": (0.0, 1.0),
    "inc": (0.0, 1.0),
}
FRACTIONAL = ("mstd", "p")


def _name_and_number(text: str, part: str) -> tuple[str, float]:
    """Splits a part of a policy into its name and its number, 0 for ``tweights``."""
    if part == "tweights":
        return part, 0.0
    name, digits = re.fullmatch(r"([a-z]*)(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
    where = f"config.data.auto_augment is {text!r}, in which {part!r}"
    if name not in NUMBER_RANGES:
        raise UserError(f"{where} is unknown{nearest(name, [*NUMBER_RANGES, 'tweights'])}")
    if not re.fullmatch(r"\d+(\.\d*)?" if name in FRACTIONAL else r"\d+", digits):
        kind = "number" if name in FRACTIONAL else "whole number"
        raise UserError(f"{where} lacks its number; expected {name} and a {kind}")
    low, high = NUMBER_RANGES[name]
    if not low <= float(digits) <= high:
        bound = f"{low:g} or more" if high == float("inf") else f"{low:g} to {high:g}"
        raise UserError(f"{where} is out of range; expected {bound}")
    return name, float(digits)


def apply_operation(image: Image.Image, name: str, level: float, canvas: Canvas) -> Image.Image:
    """Applies an operation of `OPERATIONS` to an RGB image.

    Args:
      image: not modified.
      name: of the operation.
      level: magnitude divided by 10, negative for the other direction of a signed operation.
      canvas: used only by warps.
    """
    operation = OPERATIONS[name]
    return operation.apply(image, operation.strength(level), canvas)


def draw_level(rng: np.random.Generator, policy: Policy, signed: bool) -> float:
    """Draws the level of one operation: the limited magnitude divided by 10, with a sign if ``signed``."""
    magnitude: float = policy.magnitude
    if policy.magnitude_std == float("inf"):
        magnitude = rng.uniform(0, magnitude)
    elif policy.magnitude_std > 0:
        magnitude = rng.normal(magnitude, policy.magnitude_std)
    level = max(0.0, min(magnitude, policy.magnitude_max)) / MAX_MAGNITUDE
    return -level if signed and rng.random() < 0.5 else level


def rand_augment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    policy: Policy,
    resamples: tuple[Image.Resampling, ...],
    fill: tuple[int, ...],
) -> Image.Image:
    """Draws operations from the policy and applies them one after the other.

    Args:
      image: RGB, not modified.
      rng: the only source of randomness.
      policy: see `parse_policy`.
      resamples: interpolations, of which each warp takes one at random.
      fill: colour outside a warped image, 0 to 255, unless the policy has one.
    """
    weights = policy.weights or None
    names = rng.choice(policy.operations, policy.count, replace=weights is None, p=weights)
    for name in names.tolist():
        if rng.random() < policy.prob:
            level = draw_level(rng, policy, OPERATIONS[name].signed)
            resample = resamples[int(rng.integers(len(resamples)))]
            image = apply_operation(image, name, level, Canvas(resample, policy.fill or fill))
    return image
