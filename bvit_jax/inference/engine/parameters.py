"""The folded arrays of a model, by name and in the groups that operations take."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from bvit_jax.binary.units import Vector
from bvit_jax.inference.engine.operations import Context, End, Product, Unit


class ScaledUnit(NamedTuple):
    """A unit whose norm is computed from each token, so that the scale of the weights stays before it.

    With ``s = norm(count * scale) * factor + shift + shortcut`` it is as `Unit`.
    """

    product: Product
    scale: Vector
    factor: Vector
    shift: Vector
    slope: Vector
    move2: Vector


class Parameters:
    """Arrays whose names start with a prefix, by the rest of their names."""

    def __init__(self, arrays: Mapping[str, Any], prefix: str = "") -> None:
        self.arrays, self.prefix = arrays, prefix

    def __getitem__(self, name: str) -> Array:
        return jnp.asarray(self.arrays[self.prefix + name])

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def at(self, name: str) -> "Parameters":
        """Returns those below a name."""
        return Parameters(self.arrays, f"{self.prefix}{name}/")

    def product(self, name: str) -> Product:
        """Returns a binary matrix and its shift."""
        p = self.at(name)
        return Product(p["move"], *p.codes())

    def codes(self) -> tuple[Array, Array]:
        """Returns the planes of a binary matrix, the second without words where no code is zero."""
        negative = self["negative"]
        return negative, self["nonzero"] if "nonzero" in self else negative[:0]

    def unit(self, name: str) -> Any:
        """Returns a `Unit`, or a `ScaledUnit` where there is a scale."""
        p = self.at(name)
        kind: Any = ScaledUnit if "scale" in p else Unit
        return kind(self.product(name), *(p[field] for field in kind._fields[1:]))

    def end(self, name: str) -> End:
        """Returns the end of a branch."""
        return End(*(self.at(name)[field] for field in End._fields))

    def context(self, name: str) -> Context:
        """Returns what follows the counts of attention."""
        return Context(*(self.at(name)[field] for field in Context._fields))
