"""The random keys of a run, each a function of its seed and the step alone."""

import jax
from jax import Array

# Folded into the key of a step, which itself is the key of dropout.
AUGMENTATION_KEY, MICROBATCHES_KEY, RANKING_KEY = 1, 2, 3


def run_keys(key: Array) -> tuple[Array, Array]:
    """Returns the keys of initialisation and of training, from the key of the seed."""
    key_init, key_train = jax.random.split(key)
    return key_init, key_train


def step_keys(key: Array, step: Array | int) -> tuple[Array, Array]:
    """Returns the keys of dropout and of augmentation in a step, from the key of training.

    ``step`` counts the steps taken before it, as `TrainState.step` does.
    """
    step_key = jax.random.fold_in(key, step)
    return step_key, jax.random.fold_in(step_key, AUGMENTATION_KEY)
