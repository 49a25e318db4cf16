"""Folding of what all families have: products, norms, units, ends of branches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bvit_jax.binary.bits import WORD
from bvit_jax.binary.weights import BITS, CONV, DENSE, RECU, WeightRule

Arrays = dict[str, np.ndarray]
Tree = Mapping[str, Any]


def below(prefix: str, arrays: Arrays) -> Arrays:
    """Returns arrays with a prefix before their names."""
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def product(kernel: np.ndarray, move: np.ndarray, rule: WeightRule) -> Arrays:
    """Returns a `Product` of a kernel (..., inputs, outputs) whose first axes are one: see `codes_of`."""
    codes = codes_of(kernel, rule)
    packed = {"move": move.ravel(), "negative": words(codes < 0)}
    return packed if codes.all() else packed | {"nonzero": words(codes != 0)}


def codes_of(kernel: np.ndarray, rule: WeightRule) -> np.ndarray:
    """Returns the codes of a kernel as a matrix (inputs, outputs)."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    if rule in (DENSE, RECU):
        matrix = matrix - matrix.mean(axis=0)
    elif rule not in (CONV, BITS):
        raise ValueError(f"the codes of {rule} are not known here")
    return np.where(matrix >= 0, 1.0, -1.0) if rule == BITS else np.sign(matrix)


def scale_of(kernel: np.ndarray) -> np.ndarray:
    """Returns the mean magnitude of each output channel."""
    return np.abs(kernel.reshape(-1, kernel.shape[-1])).mean(axis=0)


def words(bits: np.ndarray) -> np.ndarray:
    """Packs bits (inputs, outputs) into uint32 (words, outputs) as `bvit_jax.binary.bits.pack` does."""
    padded = np.pad(bits, ((0, -bits.shape[0] % WORD), (0, 0)))
    octets = np.packbits(padded.reshape(-1, 4, 8, bits.shape[1]), axis=2, bitorder="little")[:, :, 0]
    places = 8 * np.arange(4, dtype=np.uint32)[:, None]
    return np.asarray(np.sum(octets.astype(np.uint32) << places, axis=1, dtype=np.uint32))


@dataclass(frozen=True)
class Norms:
    """The norms of a model, which share kind and epsilon."""

    folded: bool
    epsilon: float

    @classmethod
    def of(cls, config: Tree) -> "Norms":
        """Returns those of a model's settings."""
        return cls(config["norm"] == "batch_norm", config["norm_epsilon"])

    def affine(self, params: Tree, statistics: Tree, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns factor and shift of a norm; those of a layer norm come after it has been normalised."""
        norm = params[name]
        if not self.folded:
            return norm["scale"], norm["bias"]
        factor = norm["scale"] / np.sqrt(statistics[name]["var"] + self.epsilon)
        return factor, norm["bias"] - statistics[name]["mean"] * factor

    def norm(self, params: Tree, statistics: Tree, name: str) -> Arrays:
        """Returns ``factor`` and ``shift`` of a norm."""
        return dict(zip(("factor", "shift"), self.affine(params, statistics, name), strict=True))

    def following(self, params: Tree, statistics: Tree, scale: np.ndarray | float) -> Arrays:
        """Returns factor, shift, slope and move2 of a module's ``norm`` and ``rprelu`` after a product.

        ``scale`` is that of the product, which a layer norm keeps before it.
        """
        factor, shift = self.affine(params, statistics, "norm")
        rprelu = params["rprelu"]
        return {
            "factor": factor * scale if self.folded else factor,
            "shift": shift - rprelu["move1"],
            "slope": rprelu["slope"],
            "move2": rprelu["move2"],
        }

    def unit(
        self, params: Tree, statistics: Tree, dense: str = "dense", rule: WeightRule = DENSE, times: int = 1
    ) -> Arrays:
        """Returns a unit whose product is called ``dense``, and its shift repeated ``times``."""
        kernel = params[dense]["kernel"]
        move = np.tile(params[dense]["move"].ravel(), times)
        scale = scale_of(kernel)
        arrays = product(kernel, move, rule) | self.following(params, statistics, scale)
        return arrays if self.folded else arrays | {"scale": scale}


def end(scale: Tree | None, move: np.ndarray | float, following: Arrays) -> Arrays:
    """Returns the end of a branch, given its LayerScale, if any, a shift, and the norm that follows."""
    width = following["factor"].shape
    alpha, own = (np.ones(width), np.zeros(width)) if scale is None else (scale["alpha"], scale["move"])
    return {"alpha": alpha, "move": own + move} | following
