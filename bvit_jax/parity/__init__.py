"""Parity with PyTorch: ``bvit parity {check,layers,dump}``; see ``docs/parity.md``.

Golden files hold what the PyTorch code computed from some weights and images in float64. ``check`` compares
our model with them group by group, ``layers`` layer by layer; ``dump`` writes them by running ``torch_side``
in the Python of the PyTorch code. May build and run models; trains nothing.
"""

from bvit_jax.parity.golden import GoldenFile, Row, compare
from bvit_jax.parity.reference import config_of

__all__ = ["GoldenFile", "Row", "compare", "config_of"]
