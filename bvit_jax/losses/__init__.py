"""Losses: cross-entropy with labels and with a teacher, attention compared with the teacher's, and accuracy.

Pure functions of arrays that compute in float32 or wider. They know no models and no settings; a loss is a
term of one sum, never a training loop of its own.
"""

from bvit_jax.losses.attention import Ranking, attention_loss
from bvit_jax.losses.classification import (
    TeacherTargets,
    cross_entropy,
    hard_cross_entropy,
    label_targets,
    soft_cross_entropy,
    topk_correct,
    training_loss,
)
from bvit_jax.losses.ranking import ranking_loss

__all__ = [
    "Ranking",
    "TeacherTargets",
    "attention_loss",
    "cross_entropy",
    "hard_cross_entropy",
    "label_targets",
    "ranking_loss",
    "soft_cross_entropy",
    "topk_correct",
    "training_loss",
]
