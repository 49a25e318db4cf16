"""Gradient accumulation: equal to the large batch, or to a loop over microbatches written by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bvit_jax.losses.classification import training_loss
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated, shard_batch
from bvit_jax.training.steps.state import create_state
from tests.small import (
    NORMALIZE,
    SIZE,
    Small,
    assert_close,
    batch_of,
    jit_train_step,
    make_train_step,
    optimizer,
    wide,
)

KEY = jax.random.key(7)


def mixes(key, images, normalize):
    """Stands in for an `Augmentation`: each image and its label are mixed with those of its partner."""
    lam = jax.random.uniform(key, images.shape[:1])
    own = lam[:, None, None, None]
    return images * own + images[::-1] * (1 - own), lam


def initial(model):
    return wide(create_state(jax.random.key(0), model, optimizer(), SIZE))


def run(model, k, batches, devices=1, **settings):
    """Returns the state after a step for each batch, and the last step's metrics."""
    mesh = make_mesh(jax.devices()[:devices])
    step = make_train_step(model, optimizer(), NORMALIZE, accumulate_steps=k, mesh=mesh, **settings)
    compiled = jit_train_step(step, mesh)
    state = jax.device_put(initial(model), replicated(mesh))
    for batch in batches:
        state, metrics = compiled(state, shard_batch(batch, mesh), {}, KEY)
    return jax.device_get((state, metrics))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("settings", [{}, {"augmentation": mixes}])
def test_without_batch_norms_it_equals_the_large_batch(settings):
    batches = [batch_of(12, seed) for seed in range(3)]
    whole = run(Small("layer_norm"), 1, batches, **settings)
    parts = run(Small("layer_norm"), 3, batches, **settings)
    assert_close(parts, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_teacher_sees_the_images_of_each_microbatch():
    teacher = Small("layer_norm")
    variables = wide(teacher.init(jax.random.key(5), jnp.zeros((1, SIZE, SIZE, 3))))
    batch, metrics = batch_of(12), []
    for k in (1, 4):
        step = make_train_step(
            Small("layer_norm"),
            optimizer(),
            NORMALIZE,
            teacher=teacher,
            distillation_weight=0.5,
            accumulate_steps=k,
        )
        metrics.append(jax.jit(step)(initial(Small("layer_norm")), batch, variables, KEY)[1])
    assert set(metrics[0]) == {"loss", "distillation_loss", "label_loss", "train_top1", "gradient_norm"}
    assert_close(metrics[1], metrics[0])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_batch_norms_it_equals_a_loop_by_hand(dropout):
    model, k, batch = Small(dropout=dropout), 3, jax.device_put(batch_of(12))
    state, metrics = run(model, k, [batch])
    start = initial(model)
    total, stats, losses = None, start.batch_stats, []
    step_key = jax.random.fold_in(KEY, 0)
    for i in range(k):
        images, labels = NORMALIZE(batch["image"][i::k]), batch["label"][i::k]

        def loss_of(params, stats=stats, images=images, labels=labels, i=i):
            output, updates = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(jax.random.fold_in(step_key, 2), i)},
            )
            loss, _ = training_loss(
                output.head_logits, labels, None, distillation_weight=1.0, label_smoothing=0.1
            )
            return loss, updates["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(start.params)
        losses.append(float(loss))
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    mean = jax.tree.map(lambda g: g / k, total)
    updates, _ = optimizer().update(mean, start.opt_state, start.params)
    assert_close(state.params, optax.apply_updates(start.params, updates))
    assert_close(state.batch_stats, stats)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-12)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(mean), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_one_and_eight_devices_agree():
    one, eight = (run(Small(), 2, [batch_of(16)], devices, augmentation=mixes) for devices in (1, 8))
    assert_close(eight, one, rtol=1e-9)


def test_microbatches_are_spread_over_all_devices_and_no_image_moves():
    mesh, model = make_mesh(), Small(dtype=jnp.float32)
    step = make_train_step(model, optimizer(), NORMALIZE, accumulate_steps=4, mesh=mesh)
    state = jax.eval_shape(lambda key: create_state(key, model, optimizer(), SIZE), KEY)
    batch = {
        name: jax.ShapeDtypeStruct((64, *array.shape[1:]), array.dtype, sharding=batch_sharded(mesh))
        for name, array in batch_of(1).items()
    }
    text = jit_train_step(step, mesh).lower(state, batch, {}, KEY).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    images = {tuple(map(int, dims.split(","))) for dims in re.findall(r"u8\[([\d,]+)\]", text)}
    assert max(np.prod(shape) for shape in images) == 8 * SIZE * SIZE * 3  # a device's part
    assert (2, SIZE, SIZE, 3) in images or (2, 1, SIZE, SIZE, 3) in images  # of a microbatch


@pytest.mark.slow
def test_one_microbatch_is_the_step_as_it_was():
    model = Small(dropout=0.5, dtype=jnp.float32)
    state = create_state(jax.random.key(0), model, optimizer(), SIZE)
    batch = jax.device_put(batch_of(8))
    step = make_train_step(model, optimizer(), NORMALIZE)
    _, metrics = jax.jit(step)(state, batch, {}, KEY)
    output, _ = model.apply(
        state.variables,
        NORMALIZE(batch["image"]),
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.fold_in(KEY, 0)},
    )
    expected, _ = training_loss(
        output.head_logits, batch["label"], None, distillation_weight=1.0, label_smoothing=0.1
    )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert "scan[" not in str(jax.make_jaxpr(step)(state, batch, {}, KEY))
