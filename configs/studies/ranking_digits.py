"""Attention compared with the teacher's in three ways, in Bi-ViT on digits.

Command: bvit ablate ranking_digits --dir DIR
Expected: no ranking 88.5 % (three seeds), and none is clearly better; correlation, 1: 81.0 %.
Hardware and cost: 75 minutes on one core of an Intel Xeon with AVX-512.
"""

from bvit_jax.ablation import Study
from bvit_jax.configs import bivit_digits

# Of each row: how a row of attention is compared, and the weight of the term.
ROWS = {
    "no ranking": ("pairs", 0.0),
    "pairs, 0.1": ("pairs", 0.1),
    "correlation, 0.1": ("correlation", 0.1),
    "correlation, 1": ("correlation", 1.0),
    "listwise, 0.1": ("listwise", 0.1),
    "listwise, 1": ("listwise", 1.0),
}


def get_study() -> Study:
    """Returns the study."""
    rows = {}
    for row, (kind, weight) in ROWS.items():
        config = rows[row] = bivit_digits.get_config()
        config.loss.ranking_kind = kind
        config.loss.ranking_weight = weight
        config.loss.ranking_every = 1
        config.epochs = 15
        config.eval_every_epochs = 5
        config.health = False
    return Study("Ways to compare attention, on digits", rows, baseline="no ranking")
