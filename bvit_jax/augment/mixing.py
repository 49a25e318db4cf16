"""Mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019) on the device, following ``timm/data/mixup.py``.

Image i is mixed with image B - 1 - i: the partners are the reversed global batch, so a mixed batch does not
depend on the number of devices. Drawing random values is separate from applying them; a draw has one value
per batch or one per image.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32, Key

from bvit_jax.augment.boxes import Box, box_area, box_at, inside_box
from bvit_jax.losses.classification import Labels, Targets, label_targets

Mode = Literal["batch", "pair", "elem"]
Images = Float[Array, "batch height width channels"]
Shares = Float[Array, " n"]


class Mix(NamedTuple):
    """How images are mixed with their partners; n is 1, for the whole batch, or B.

    Attributes:
      use_cutmix: whether a box of the partner replaces that of the image.
      box: see `bvit_jax.augment.boxes`.
      lam: the share of pixels and label that the image keeps; the partner has the rest.
    """

    use_cutmix: Bool[Array, " n"]
    box: Int32[Array, "n 4"]
    lam: Shares


def cutmix_box(lam: Float32[Array, ""], centre: Int32[Array, "2"], height: int, width: int) -> Box:
    """Returns a box with the share ``1 - lam`` of the image's area, cut off at its borders.

    As timm's ``rand_bbox``.
    """
    sizes = jnp.array([height, width], jnp.int32)
    half = (sizes.astype(jnp.float32) * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    start, end = jnp.clip(centre - half, 0, sizes), jnp.clip(centre + half, 0, sizes)
    return box_at(start, end - start)


def mix_images(images: Images, partners: Images, mix: Mix) -> Images:
    """Mixes images with their partners."""
    height, width = images.shape[1:3]
    outside = ~jax.vmap(inside_box, (0, None, None))(mix.box, height, width)
    lam = mix.lam.astype(images.dtype)[:, None, None, None]
    own = jnp.where(mix.use_cutmix[:, None, None, None], outside.astype(images.dtype), lam)
    return images * own + partners * (1 - own)


def mix_targets(
    labels: Labels, lam: Shares, num_classes: int, smoothing: float, partners: Labels | None = None
) -> Targets:
    """Returns the smoothed targets of mixed images.

    ``partners`` are the labels of the partners, needed if the images are only a part of the batch.
    """
    partners = labels[::-1] if partners is None else partners
    own, others = (label_targets(kind, num_classes, smoothing, jnp.float32) for kind in (labels, partners))
    return own * lam[:, None] + others * (1 - lam[:, None])


def dominant_labels(labels: Labels, lam: Shares, partners: Labels | None = None) -> Labels:
    """Returns the label with the larger share, the image's own in a tie; ``partners`` as in `mix_targets`."""
    return jnp.where(lam >= 0.5, labels, labels[::-1] if partners is None else partners)


@dataclass(frozen=True)
class Mixing:
    """timm's ``Mixup`` with the same defaults, except that it is off.

    Attributes:
      mixup_alpha: the share that an image keeps in mixup follows Beta(alpha, alpha); 0 for no mixup.
      cutmix_alpha: likewise for cutmix.
      cutmix_minmax: if given, cutmix is on, and the height and width of its box are drawn uniformly from
        this range of shares of the image's.
      prob: probability of mixing at all.
      switch_prob: probability of cutmix if both are on.
      mode: whether to draw once per batch, per pair of images or per image.
      correct_lam: whether to compute the share of cutmix from the box after it is cut off at the borders.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    cutmix_minmax: tuple[float, ...] = ()
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Mode = "batch"
    correct_lam: bool = True

    @property
    def active(self) -> bool:
        """Whether anything is ever mixed."""
        return bool(self.prob and (self.mixup_alpha or self.cutmix_alpha or self.cutmix_minmax))

    def draw(self, key: Key[Array, ""], batch: int, height: int, width: int) -> Mix:
        """Draws how ``batch`` images are mixed; for pairs their number must be even."""
        number = {"batch": 1, "pair": batch // 2, "elem": batch}[self.mode]
        keys = jax.random.split(key, number)
        mix = jax.vmap(lambda key: self._draw_one(key, height, width))(keys)
        if self.mode == "pair":
            return Mix(*(jnp.concatenate([drawn, drawn[::-1]]) for drawn in mix))
        return mix

    def _draw_one(self, key: Array, height: int, width: int) -> Mix:
        key_mixed, key_kind, key_mixup, key_cutmix, key_box = jax.random.split(key, 5)
        cutmix_alpha = 1.0 if self.cutmix_minmax else self.cutmix_alpha
        switch_prob = self.switch_prob if self.mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)
        mixed = jax.random.bernoulli(key_mixed, self.prob)
        use_cutmix = mixed & jax.random.bernoulli(key_kind, switch_prob)
        lam, lam_cutmix = _draw_lam(key_mixup, self.mixup_alpha), _draw_lam(key_cutmix, cutmix_alpha)
        box = self._draw_box(key_box, lam_cutmix, height, width)
        if self.correct_lam or self.cutmix_minmax:
            lam_cutmix = 1 - box_area(box).astype(jnp.float32) / (height * width)
        lam = jnp.where(use_cutmix, lam_cutmix, lam)
        return Mix(use_cutmix, box, jnp.where(mixed, lam, jnp.float32(1)))

    def _draw_box(self, key: Array, lam: Array, height: int, width: int) -> Array:
        sizes = jnp.array([height, width], jnp.int32)
        if not self.cutmix_minmax:
            return cutmix_box(lam, jax.random.randint(key, (2,), 0, sizes, jnp.int32), height, width)
        low, high = self.cutmix_minmax
        key_size, key_start = jax.random.split(key)
        lows = jnp.array([int(height * low), int(width * low)], jnp.int32)
        highs = jnp.array([int(height * high), int(width * high)], jnp.int32)
        size = jax.random.randint(key_size, (2,), lows, highs, jnp.int32)
        return box_at(jax.random.randint(key_start, (2,), 0, sizes - size, jnp.int32), size)


def _draw_lam(key: Array, alpha: float) -> Array:
    return jax.random.beta(key, alpha, alpha, dtype=jnp.float32) if alpha else jnp.float32(1)
