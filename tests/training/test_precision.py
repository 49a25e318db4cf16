"""The precision of products of float32 numbers: where it is asked for, and nowhere else."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from bvit_jax.runtime.mesh import make_mesh
from bvit_jax.training.steps.evaluate import EvalSettings
from bvit_jax.training.steps.programs import jit_eval_step, jit_train_step
from bvit_jax.training.steps.state import create_state
from tests.small import NORMALIZE, SIZE, Small, batch_of, make_train_step, optimizer

MODEL = Small(dtype=jnp.float32)
PRECISION = "precision = [HIGHEST, HIGHEST]"


def lowered(precision: str, teacher_precision: str = "default") -> str:
    """Returns the training step of a student and a teacher of two products each."""
    adam = optimizer()
    state = jax.eval_shape(
        partial(create_state, model=MODEL, optimizer=adam, image_size=SIZE), jax.random.key(0)
    )
    step = make_train_step(MODEL, adam, NORMALIZE, teacher=MODEL, teacher_precision=teacher_precision)
    settings = dataclasses.replace(step.args[0], matmul_precision=precision)
    mesh = make_mesh(jax.devices()[:1])
    return (
        jit_train_step(settings, mesh).lower(state, batch_of(4), state.variables, jax.random.key(1)).as_text()
    )


@pytest.mark.parametrize(
    ("precision", "teacher", "products"),
    # Two forward and three backward, since images have no gradient; two of the teacher.
    [("default", "default", 0), ("highest", "default", 7), ("default", "highest", 2)],
)
def test_products_of_a_training_step(precision: str, teacher: str, products: int) -> None:
    assert lowered(precision, teacher).count(PRECISION) == products


def test_products_of_an_evaluation_step() -> None:
    variables = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3))))
    batch = {**batch_of(4), "mask": jnp.ones(4, bool), "bad": jnp.full(4, -1)}
    for precision, products in (("default", 0), ("highest", 2)):
        settings = EvalSettings(MODEL, NORMALIZE, matmul_precision=precision)
        text = jit_eval_step(settings, make_mesh(jax.devices()[:1])).lower(variables, batch).as_text()
        assert text.count(PRECISION) == products
