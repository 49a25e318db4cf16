"""A packed model as a function of its arrays, with the interface of a Flax module."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bvit_jax.errors import UserError
from bvit_jax.inference.engine import families


class Output(NamedTuple):
    """What a network returns: logits (images, classes)."""

    logits: Array


@dataclass(frozen=True, eq=False)
class Network:
    """Runs a folded model; ``apply`` is called as that of a Flax module in evaluation.

    Attributes:
      settings: the name and all settings of the model.
    """

    settings: Mapping[str, Any]

    def apply(self, arrays: Mapping[str, Any], images: Array) -> Output:
        """Returns the logits of normalised images (images, size, size, 3)."""
        return Output(families.apply(self.settings, arrays, images))

    def prepare(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arrays with which ``apply`` compiles faster."""
        return families.prepared(self.settings, arrays)

    def check(self, arrays: Mapping[str, Any]) -> None:
        """Raises `UserError` unless arrays fit the settings; computes nothing."""
        try:
            size = self.settings["image_size"]
            arrays = jax.eval_shape(self.prepare, dict(arrays))
            images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
            shape = jax.eval_shape(self.apply, dict(arrays), images).logits.shape
            if shape != (1, self.settings["num_classes"]):
                raise ValueError(f"they make logits {shape}")
        except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            reason = str(error).split("\n", 1)[0]
            raise UserError(
                f"arrays that do not fit the settings of a packed {self.settings.get('name')}: {reason}"
            ) from error
