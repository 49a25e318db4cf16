"""What BHViT's ingredients give, one left out or added at a time, on digits.

Command: bvit ablate bhvit_digits --dir DIR
Expected: not run.
Hardware and cost: not run.
"""

from typing import Any

from bvit_jax.ablation import Study
from bvit_jax.configs import bhvit_digits

# Of each row: what changes in the model, and the weight of the term that draws weights to ±1.
ROWS: dict[str, tuple[dict[str, Any], float]] = {
    "BHViT": ({}, 0.0),
    "no shift branches": ({"shift_branches": ()}, 0.0),
    "attention as three masks": ({"gsb": True}, 0.0),
    "gradient of ReCU": ({"recu": True}, 0.0),
    "weights drawn to ±1": ({}, 0.1),
    "real patch embeddings": ({"some_fp": True}, 0.0),
}


def get_study() -> Study:
    """Returns the study."""
    rows = {}
    for row, (settings, weight) in ROWS.items():
        config = rows[row] = bhvit_digits.get_config()
        config.model.update(settings)
        config.loss.regularization_weight = weight
        config.loss.distillation_weight = 1.0 - weight
        config.epochs = 15
        config.health = False
    return Study("BHViT's ingredients on digits", rows, baseline="BHViT")
