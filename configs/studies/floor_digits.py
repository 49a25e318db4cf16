"""A floor for the scale of attention probabilities, in BinaryViT on digits.

Command: bvit ablate floor_digits --dir DIR
Expected: 97.4, 97.2 and 97.2 % top-1 (three seeds): no difference; see docs/results.md.
Hardware and cost: 13 minutes on one core of an AMD EPYC with AVX-512.
"""

from bvit_jax.ablation import Study
from bvit_jax.configs import digits

FLOORS = {"no floor": 0.0, "floor of 0.0001": 1e-4, "floor of 0.001": 1e-3}


def get_study() -> Study:
    """Returns the study."""
    rows = {row: digits.get_config() for row in FLOORS}
    for row, config in rows.items():
        config.model.prob_scale_floor = FLOORS[row]
        config.eval_every_epochs = 10
        config.health = False
    return Study("The scale of attention probabilities on digits", rows, baseline="no floor")
