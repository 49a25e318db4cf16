"""A model with its weights and everything needed to use them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from bvit_jax.weights.formats import FORMATS
from bvit_jax.weights.naming import path_name
from bvit_jax.weights.preprocessing import Preprocessing
from bvit_jax.weights.state_dicts import StateDict, Variables


@dataclass(frozen=True)
class Pretrained:
    """A model, its weights, and what is needed to use them.

    Attributes:
      config: the model's configuration.
      variables: numpy arrays in the dtypes of the file.
      preprocessing: from an image file to the model's input.
      class_names: one per class.
      history: the files that the weights came from, oldest first: name, SHA-256, format.
      bookkeeping: arrays of the PyTorch file that do not affect the function, kept for the way back.
      bookkeeping_format: the format whose names they have.
      assumed: settings that the file did not determine, in words.
      left_out: entries of a training checkpoint that are not weights.
    """

    config: ConfigDict
    variables: Variables
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    history: tuple[Mapping[str, Any], ...] = ()
    bookkeeping: StateDict = field(default_factory=dict)
    bookkeeping_format: str = ""
    assumed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def arrays(self, dtype: DTypeLike = np.float32) -> Variables:
        """Returns the variables in one dtype."""
        return jax.tree.map(lambda a: np.asarray(a, dtype), self.variables)

    def unused(self) -> tuple[str, ...]:
        """Returns the names of the kept arrays that PyTorch's modules own but never read, sorted."""
        if not self.bookkeeping:
            return ()
        naming = FORMATS[self.bookkeeping_format].naming(self.config)
        return tuple(sorted(filter(naming.is_unused, self.bookkeeping)))

    def not_finite(self) -> tuple[str, ...]:
        """Returns the names of the arrays that hold NaN or infinite values, sorted."""
        arrays = sorted(flatten(self.variables).items())
        return tuple(name for name, a in arrays if not np.isfinite(np.asarray(a, np.float32)).all())

    def digest(self) -> str:
        """Returns a SHA-256 of the weights, which does not depend on the file that they came from."""
        total = hashlib.sha256()
        for name, array in sorted(flatten(self.variables).items()):
            total.update(f"{name} {array.dtype} {array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()


def flatten(variables: Variables) -> StateDict:
    """Returns the arrays of a tree by their path, such as ``params/head/bias``."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {path_name(path): np.asarray(array) for path, array in leaves}
