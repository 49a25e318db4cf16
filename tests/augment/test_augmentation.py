"""Erasing and mixing together, on several devices and inside the training step."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bvit_jax.augment.augmentation import NO_AUGMENTATION, Augmentation
from bvit_jax.augment.erasing import Erasing
from bvit_jax.augment.mixing import Mixing, mix_images
from bvit_jax.augment.normalization import Normalization
from bvit_jax.losses.classification import label_targets
from bvit_jax.models import ModelOutput
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated
from bvit_jax.training.steps.state import create_state
from tests.small import make_train_step

STUDENT = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TEACHER = Normalization((0.5, 0.5, 0.5), (0.5, 0.4, 0.3))
DEIT = Augmentation(Erasing(prob=0.25), Mixing(mixup_alpha=0.8, cutmix_alpha=1.0))
BATCH, SIZE, CLASSES = 16, 16, 5


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": jnp.array(rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)), jnp.uint8),
        "label": jnp.array(rng.integers(0, CLASSES, BATCH), jnp.int32),
    }


def test_nothing_is_changed_by_default(batch):
    pictures, lam = NO_AUGMENTATION(jax.random.key(0), batch["image"], STUDENT)
    assert pictures is batch["image"]
    assert lam is None


@pytest.mark.slow
def test_images_are_erased_before_they_are_mixed(batch):
    key = jax.random.key(5)
    pictures, lam = jax.jit(lambda key, images: DEIT(key, images, STUDENT))(key, batch["image"])
    key_erase, key_mix = jax.random.split(key)
    erased = DEIT.erasing(jax.random.split(key_erase, BATCH), batch["image"], STUDENT)
    mix = jax.jit(lambda key: DEIT.mixing.draw(key, BATCH, SIZE, SIZE))(key_mix)
    assert 1 <= np.any(np.asarray(erased) != np.asarray(batch["image"]), axis=(1, 2, 3)).sum() <= 9
    np.testing.assert_allclose(pictures, mix_images(erased, erased[::-1], mix), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(lam, mix.lam)


def test_erasing_alone_keeps_the_labels(batch):
    pictures, lam = Augmentation(Erasing(prob=1.0), Mixing())(jax.random.key(1), batch["image"], STUDENT)
    assert lam is None
    assert np.any(np.asarray(pictures) != np.asarray(batch["image"]), axis=(1, 2, 3)).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_the_number_of_devices_changes_nothing(mode, batch):
    augmentation = Augmentation(Erasing(0.5), Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode))
    results = []
    for devices in (1, 8):
        mesh = make_mesh(jax.devices()[:devices])
        run = jax.jit(
            lambda key, images: augmentation(key, images, STUDENT),
            in_shardings=(replicated(mesh), batch_sharded(mesh)),
            out_shardings=(batch_sharded(mesh), replicated(mesh)),
        )
        arguments = (
            jax.device_put(jax.random.key(3), replicated(mesh)),
            jax.device_put(batch["image"], batch_sharded(mesh)),
        )
        compiled = run.lower(*arguments).compile()
        results.append(jax.device_get(compiled(*arguments)))
    for one, eight in zip(*results):
        np.testing.assert_array_equal(one, eight)
    # The devices exchange their uint8 images pairwise; none gathers those of the others.
    text = compiled.as_text()
    assert re.search(r"= u8\[2,16,16,3\]\S* collective-permute\(", text)
    assert not re.search(r"= \w+\[\d+,\d+,\d+,\d+\]\S* (all-gather|all-to-all)\(", text)
    assert not re.search(r"= f32\[\d+,\d+,\d+,\d+\]\S* collective-permute\(", text)


class Probe(nn.Module):
    """Hands its images out; its logits are five of their pixels, times a parameter."""

    remember: Callable[[jax.Array], None]

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> ModelOutput:
        if not isinstance(images, jax.core.Tracer):
            self.remember(images)
        scale = self.param("scale", nn.initializers.ones, ())
        logits = scale * images.reshape(images.shape[0], -1)[:, 100 : 100 + CLASSES]
        return ModelOutput(logits, (logits,))


@pytest.fixture(scope="module")
def stepped(batch):
    """One step of the whole recipe with a teacher, not compiled: images of both, and the metrics."""
    seen: tuple[list, list] = ([], [])
    student, teacher = (Probe(images.append) for images in seen)
    optimizer = optax.sgd(0.0)
    variables = teacher.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    state = create_state(jax.random.key(0), student, optimizer, SIZE)
    seen[0].clear(), seen[1].clear()
    step = make_train_step(
        student,
        optimizer,
        STUDENT,
        teacher=teacher,
        teacher_normalize=TEACHER,
        distillation_weight=0.9,
        augmentation=DEIT,
    )
    key = jax.random.key(7)
    _, metrics = step(state, batch, variables, key)
    key = jax.random.fold_in(jax.random.fold_in(key, 0), 1)
    pictures, lam = DEIT(key, batch["image"], STUDENT)
    return seen[0][0], seen[1][0], metrics, pictures, lam


@pytest.mark.slow
def test_student_and_teacher_see_the_same_pictures(stepped):
    student, teacher, _, pictures, _ = stepped
    np.testing.assert_array_equal(student, STUDENT(pictures))
    np.testing.assert_array_equal(teacher, TEACHER(pictures))
    np.testing.assert_allclose(STUDENT.inverse(student), TEACHER.inverse(teacher), atol=1e-3)


def test_the_labels_are_mixed_like_the_images(stepped, batch):
    student, teacher, metrics, _, lam = stepped
    student, teacher, lam = (np.asarray(array) for array in (student, teacher, lam))
    logits, teacher_logits = (x.reshape(BATCH, -1)[:, 100 : 100 + CLASSES] for x in (student, teacher))
    own = np.asarray(label_targets(batch["label"], CLASSES, 0.1, jnp.float32))
    assert lam.shape == (1,)
    assert 0 < lam[0] < 1
    targets = lam[0] * own + (1 - lam[0]) * own[::-1]
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    label_loss = -(targets * log_probabilities).sum(-1).mean()
    distillation = -(np.asarray(jax.nn.softmax(teacher_logits)) * log_probabilities).sum(-1).mean()
    assert float(metrics["label_loss"]) == pytest.approx(label_loss, rel=1e-5)
    assert float(metrics["distillation_loss"]) == pytest.approx(distillation, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(0.9 * distillation + 0.1 * label_loss, rel=1e-5)
    labels = np.asarray(batch["label"])
    dominant = labels if lam[0] >= 0.5 else labels[::-1]
    assert float(metrics["train_top1"]) == pytest.approx((logits.argmax(-1) == dominant).mean())


@pytest.mark.slow
def test_each_step_draws_anew_and_repeatably(batch):
    student = Probe(lambda images: None)
    optimizer = optax.sgd(0.0)
    step = make_train_step(student, optimizer, STUDENT, augmentation=DEIT)
    state = create_state(jax.random.key(0), student, optimizer, SIZE)
    losses = []
    for _ in range(3):
        next_state, metrics = step(state, batch, {}, jax.random.key(7))
        again = step(state, batch, {}, jax.random.key(7))[1]
        assert metrics["loss"] == again["loss"]
        losses.append(float(metrics["loss"]))
        state = next_state
    assert len(set(losses)) == 3
