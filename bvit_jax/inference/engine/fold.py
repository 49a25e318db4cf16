"""From a model and its variables to the arrays that the engine runs on.

Folding is done once, in float64, and each result is rounded once to the dtype in which it is kept. In order:

1. A kernel becomes its codes, as its rule says (less its row's mean, for a linear layer of BinaryViT), and
   their scale, the mean magnitude of a row. Codes are packed into 32-bit words; a plane of those that are not
   zero is kept only where there are zeros.
2. Scale and batch norm: ``factor = norm.scale / sqrt(var + epsilon)``; ``shift = norm.bias - mean * factor``;
   then the factor times the scale of the weights, or the scale of attention probabilities.
3. ``move1`` of the RPReLU that follows is subtracted from the shift.
4. A LayerScale is the ``alpha`` and ``move`` of the branch's end, and the norm that comes next its ``factor``
   and ``shift``: that of the next branch, of the next stage, or of the whole model.
5. The LayerScales of the pooling branches, over the number of neighbours, are taps of one stencil; their
   moves are added to the ``move`` of the end that follows.
6. The norm of the embedding goes into its kernel, its bias and everything constant into the positions.

Normalising pixels stays outside. Layer norms are not folded, except for their scale and bias.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from bvit_jax.errors import UserError
from bvit_jax.inference.engine import families, folding


def fold(
    config: Mapping[str, Any], variables: Mapping[str, Any], dtype: DTypeLike = np.float32
) -> dict[str, np.ndarray]:
    """Returns the arrays of a folded model, named like ``block0/attention/query/factor``.

    Args:
      config: the complete settings of the model.
      variables: its ``params`` and, if any, ``batch_stats``.
      dtype: of real arrays; words are uint32.

    Raises:
      UserError: its weights or activations have more than one bit, or the engine has no such family.
    """
    bits = {key: config.get(key, 1) for key in ("weight_bits", "act_bits")}
    real = {key: value for key, value in bits.items() if value != 1}
    if real or config["name"] in ("deit", "swin"):
        found = [f"{key} {value}" for key, value in real.items()] or [f"{config['name']} is real-valued"]
        raise UserError(f"only a model whose weights and activations have one bit can be packed; {found[0]}")
    wide = jax.tree.map(lambda array: np.asarray(array, np.float64), dict(variables))
    family = families.module_of(config["name"], folding.__name__)
    arrays = family.fold(config, wide["params"], wide.get("batch_stats", {}))
    return {
        name: array if array.dtype == np.uint32 else array.astype(dtype) for name, array in arrays.items()
    }
