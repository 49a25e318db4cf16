"""The inference engine: networks whose every binary product counts bits, with everything foldable folded.

`fold` makes the flat dict of arrays of a model, the only file here that reads Flax's variables; `apply` runs
it, with JAX alone. `operations` are the steps that a family is made of, and `levels` who computes them: XLA
or `compiled` code. A family is one file with ``apply``, one in `folding`, and an entry of `families`.
"""

from typing import TYPE_CHECKING

from bvit_jax.imports import lazily

if TYPE_CHECKING:
    from bvit_jax.inference.engine.families import apply, prepared
    from bvit_jax.inference.engine.fold import fold

__all__ = ["apply", "fold", "prepared"]

__getattr__ = lazily(__name__)
