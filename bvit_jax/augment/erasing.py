"""Random erasing (Zhong et al., 2020) on the device, following ``timm/data/random_erasing.py``."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Key, Num, UInt32

from bvit_jax.augment.boxes import Box, box_at, inside_box
from bvit_jax.augment.normalization import Normalization

Mode = Literal["pixel", "rand", "const"]
ATTEMPTS = 10
NOISE_BITS = 10  # per colour, so that the three fit into one random word


def first_fitting_box(
    areas: Float32[Array, " n"],
    aspects: Float32[Array, " n"],
    places: Float32[Array, "n 2"],
    height: int,
    width: int,
) -> Box:
    """Returns the first candidate that fits into the image, or an empty box if none does.

    Args:
      areas: shares of the image's area.
      aspects: height / width.
      places: in [0, 1): top and left, as fractions of the range that fits.
      height, width: of the image, in pixels.
    """
    limits = jnp.array([height, width], jnp.int32)[None, :]
    pixels = areas * (height * width)
    sides = jnp.stack([jnp.sqrt(pixels * aspects), jnp.sqrt(pixels / aspects)], axis=-1)
    sizes = jnp.round(sides).astype(jnp.int32)
    starts = (places * (limits - sizes + 1).astype(jnp.float32)).astype(jnp.int32)
    fits = jnp.all(sizes < limits, axis=-1)
    first = jnp.argmax(fits)
    return box_at(starts[first], jnp.where(fits[first], sizes[first], 0))


def pixel_noise(words: UInt32[Array, "height width"]) -> Float32[Array, "height width 3"]:
    """Returns normal noise, three values per random word.

    Each value is one of 1024 equally probable quantiles of the normal distribution, the outermost at
    ±3.3. Continuous noise needs three times as many random bits, which would cost more than everything
    else in the augmentation.
    """

    def of_colour(shift: Array) -> Array:
        levels = (words >> shift) & jnp.uint32(2**NOISE_BITS - 1)
        share = (levels.astype(jnp.float32) + 0.5) / 2**NOISE_BITS
        return math.sqrt(2) * jax.lax.erf_inv(2 * share - 1)

    # A loop, because XLA would otherwise fuse this into every use, which is five times slower on a CPU.
    shifts = NOISE_BITS * jnp.arange(3, dtype=jnp.uint32)
    return jnp.moveaxis(jax.lax.map(of_colour, shifts), 0, -1)


@dataclass(frozen=True)
class Erasing:
    """timm's ``RandomErasing`` with one box and the same defaults, except that it is off.

    Attributes:
      prob: probability per image.
      mode: "pixel" fills the box with normal noise of mean 0 and deviation 1 in the units of the
        student's normalised images, "rand" with one such colour, "const" with 0, the mean colour.
      area: smallest and largest share of the image's area.
      min_aspect: smallest height / width; the largest is its reciprocal.
    """

    prob: float = 0.0
    mode: Mode = "pixel"
    area: tuple[float, float] = (0.02, 1 / 3)
    min_aspect: float = 0.3

    def __call__(
        self,
        keys: Key[Array, " batch"],
        images: Num[Array, "batch height width 3"],
        normalize: Normalization,
    ) -> Float32[Array, "batch height width 3"]:
        """Erases a box in some of the images, which are from 0 to 255; noise may exceed this scale.

        ``normalize`` is the normalisation that follows.
        """
        return jax.vmap(lambda key, image: self._erase(key, image, normalize))(keys, images)

    def _erase(self, key: Array, image: Array, normalize: Normalization) -> Array:
        height, width, _ = image.shape
        key_box, key_fill = jax.random.split(key)
        erased = inside_box(self.draw_box(key_box, height, width), height, width)
        fill = normalize.inverse(self._draw_fill(key_fill, height, width))
        return jnp.where(erased, fill, image.astype(jnp.float32))

    def draw_box(self, key: Key[Array, ""], height: int, width: int) -> Box:
        """Draws the box of one image, empty if nothing is erased."""
        key_erased, key_area, key_aspect, key_place = jax.random.split(key, 4)
        low, high = self.area
        areas = jax.random.uniform(key_area, (ATTEMPTS,), jnp.float32, low, high)
        bound = -math.log(self.min_aspect)
        aspects = jnp.exp(jax.random.uniform(key_aspect, (ATTEMPTS,), jnp.float32, -bound, bound))
        places = jax.random.uniform(key_place, (ATTEMPTS, 2), jnp.float32)
        box = first_fitting_box(areas, aspects, places, height, width)
        return jnp.where(jax.random.bernoulli(key_erased, self.prob), box, 0)

    def _draw_fill(self, key: Array, height: int, width: int) -> Array:
        """Draws normalised colours: float32 that broadcasts to [height, width, 3]."""
        if self.mode == "pixel":
            return pixel_noise(jax.random.bits(key, (height, width), jnp.uint32))
        if self.mode == "rand":
            return jax.random.normal(key, (1, 1, 3), jnp.float32)
        return jnp.zeros((1, 1, 3), jnp.float32)
