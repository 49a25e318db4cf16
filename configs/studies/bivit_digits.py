"""Bi-ViT's ablation on digits: with and without the learned scale of attention and the ranking loss.

Command: bvit ablate bivit_digits --dir DIR
Expected: baseline 20.8 %, + scale 89.4 %, both 83.4 % with a ranking weight of 1 (top-1, three seeds).
Hardware and cost: half an hour on two cores of an AMD EPYC.
"""

from bvit_jax.ablation import Study
from bvit_jax.configs import bivit_digits

# Of each row: whether attention has the learned scale, and the weight of the ranking loss.
ROWS = {
    "baseline": (False, 0.0),
    "+ scale": (True, 0.0),
    "+ ranking": (False, 1.0),
    "both": (True, 1.0),
    "both, weight 0.1": (True, 0.1),
}


def get_study() -> Study:
    """Returns the study."""
    rows = {}
    for row, (scale, weight) in ROWS.items():
        config = rows[row] = bivit_digits.get_config()
        config.model.learned_scale = scale
        config.loss.ranking_weight = weight
        config.loss.ranking_every = 1
        config.epochs = 15
        config.eval_every_epochs = 5
        config.health = False
    return Study("Bi-ViT's ablation on digits", rows, baseline="+ scale")
