"""The optimiser: learning-rate schedules, AdamW, and rules that treat some parameters differently.

Pure functions over parameter trees, built on optax and compared with ``torch.optim`` in the tests. This
package knows no models and does not import ml-collections: it takes the settings of ``config.optim`` as any
object with those attributes.
"""

from bvit_jax.optim.adamw import clip_by_global_norm, decay_mask, global_norm, make_optimizer
from bvit_jax.optim.rules import Rule, parse_rules
from bvit_jax.optim.schedule import SCHEDULES, make_schedule

__all__ = [
    "SCHEDULES",
    "Rule",
    "clip_by_global_norm",
    "decay_mask",
    "global_norm",
    "make_optimizer",
    "make_schedule",
    "parse_rules",
]
