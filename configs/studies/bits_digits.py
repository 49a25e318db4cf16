"""Bits of weights and activations, in BinaryViT on digits.

Command: bvit ablate bits_digits --dir DIR
Expected: 96.6, 97.2, 97.0, 96.8, 97.8 and 97.9 % top-1 (three seeds): no clear difference.
Hardware and cost: 14 minutes on one core of an AMD EPYC with AVX-512.
"""

from bvit_jax.ablation import Study
from bvit_jax.configs import digits

# Of each row: bits of weights and of activations; 32 are real numbers.
ROWS = {
    "W1 A1": (1, 1),
    "W2 A1": (2, 1),
    "W4 A1": (4, 1),
    "W32 A1": (32, 1),
    "W1 A32": (1, 32),
    "W32 A32": (32, 32),
}


def get_study() -> Study:
    """Returns the study."""
    rows = {}
    for row, (weights, activations) in ROWS.items():
        config = rows[row] = digits.get_config()
        config.model.weight_bits, config.model.act_bits = weights, activations
        config.epochs = 15
        config.health = False
    return Study("Bits on digits", rows, baseline="W1 A1")
