"""What a student's attention should share with its teacher's: one term of the loss, in three kinds.

`pairs` is `bvit_jax.losses.ranking`: both of a pair of keys should differ as the teacher's do, and a tie
costs no more than the margin. The other two cost more for uniform attention than for the teacher's order:
the correlation of the scores of a row, and the shares that the teacher's first keys have among each other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Key

from bvit_jax.losses.ranking import FLOOR, Probabilities, ranking_loss

Kind = Literal["pairs", "correlation", "listwise"]

NO_VARIANCE = 1e-12  # product of two variances of scores at which a row's correlation is halfway to zero


@dataclass(frozen=True)
class Ranking:
    """The term of a training step that compares attention.

    Attributes:
      weight: weight of the term in the loss.
      kind: how a row of the student is compared with the teacher's.
      margin: of pairs, see `bvit_jax.losses.ranking.ranking_loss`.
      top: keys of a row that are compared listwise, the teacher's first.
      layers: blocks that are compared, in execution order; () means all.
      every: one of this many consecutive images is compared. Images come in random order, so the mean of
        the gradient does not depend on it.
    """

    weight: float
    kind: Kind = "pairs"
    margin: float = 0.1
    top: int = 8
    layers: tuple[int, ...] = ()
    every: int = 1

    def chosen(self, probabilities: Probabilities, images: int) -> Probabilities:
        """Selects the layers and images that are compared; ``every`` divides the number of images."""
        layers = [probabilities[i] for i in self.layers] if self.layers else probabilities
        return [self._some_images(x, images) for x in layers]

    def _some_images(self, x: Array, images: int) -> Array:
        if self.every == 1:
            return x
        # Neighbours are on one device, so nothing moves if each device has a multiple of ``every`` images.
        groups = x.reshape(images // self.every, self.every, x.shape[0] // images, *x.shape[1:])
        return groups[:, 0].reshape(-1, *x.shape[1:])


def attention_loss(
    ranking: Ranking, student: Probabilities, teacher: Probabilities, key: Key[Array, ""], images: int
) -> Float[Array, ""]:
    """Returns the unweighted term, from probabilities of all layers and images; ``key`` is for the pairs."""
    student, teacher = ranking.chosen(student, images), ranking.chosen(teacher, images)
    if ranking.kind == "pairs":
        return ranking_loss(student, teacher, key, margin=ranking.margin)
    if ranking.kind == "correlation":
        return _mean_of_layers(row_correlation_loss, student, teacher)
    return _mean_of_layers(lambda s, t: row_listwise_loss(s, t, ranking.top), student, teacher)


def row_correlation_loss(student: Array, teacher: Array) -> Array:
    """Returns 1 - r for each row, r being the correlation of its scores with the teacher's.

    Scores are logarithms of probabilities. r is Pearson's: it depends on neither the mean nor the scale of
    the scores, so that uniform attention, with an r of 0, is worse than any that agrees with the teacher.
    Keys to which the teacher gives no probability, as those masked in a window, are left out.

    Args:
      student: probabilities before binarisation, (..., keys).
      teacher: likewise.
    """
    counts = teacher >= FLOOR
    number = jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True, dtype=teacher.dtype), 1)

    def centred(x: Array) -> Array:
        scores = jnp.where(counts, jnp.log(jnp.maximum(x, FLOOR)), 0)
        return jnp.where(counts, scores - jnp.sum(scores, axis=-1, keepdims=True) / number, 0)

    s, t = centred(student), centred(teacher)
    variances = jnp.sum(s * s, axis=-1) * jnp.sum(t * t, axis=-1) / number[..., 0] ** 2
    return 1 - jnp.sum(s * t, axis=-1) / number[..., 0] * lax.rsqrt(variances + NO_VARIANCE)


def row_listwise_loss(student: Array, teacher: Array, top: int) -> Array:
    """Returns the divergence in nats, for each row, of the shares that the teacher's first keys have.

    With T and S the probabilities of the teacher's ``top`` largest keys, divided by their sums, it is
    ``sum T · log(T / S)``: 0 where the student divides what it gives to these keys as the teacher does.

    Args:
      student: probabilities before binarisation, (..., keys).
      teacher: likewise.
      top: keys that count; all, if a row has no more.
    """
    best, order = lax.top_k(teacher, min(top, teacher.shape[-1]))
    chosen = jnp.take_along_axis(student, order, axis=-1, mode="promise_in_bounds")

    def log_share(x: Array) -> Array:
        return jax.nn.log_softmax(jnp.log(jnp.maximum(x, FLOOR)), axis=-1)

    wanted = log_share(best)
    return jnp.sum(jnp.exp(wanted) * (wanted - log_share(chosen)), axis=-1)


def _mean_of_layers(
    row_loss: Callable[[Array, Array], Array], student: Probabilities, teacher: Probabilities
) -> Array:
    losses = []
    for s, t in zip(student, teacher, strict=True):
        dtype = jnp.float64 if s.dtype == jnp.float64 else jnp.float32
        s, t = s.astype(dtype), lax.stop_gradient(t.astype(dtype))
        if s.shape[1] != t.shape[1]:
            s, t = jnp.mean(s, axis=1), jnp.mean(t, axis=1)
        losses.append(jnp.mean(row_loss(s, t)))
    return jnp.mean(jnp.stack(losses))
