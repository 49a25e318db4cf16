"""Losses against PyTorch and against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bvit_jax.losses import classification

B, C = 5, 7


def numbers(seed=0):
    rng = np.random.default_rng(seed)
    return (
        3 * rng.standard_normal((B, C)),
        2 * rng.standard_normal((B, C)),
        rng.integers(0, C, B),
    )


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_hand_values():
    logits = jnp.zeros((1, 4))
    label = jnp.array([2])
    targets = classification.label_targets(label, 4, 0.1, jnp.float64)
    close(targets, [[0.025, 0.025, 0.925, 0.025]])
    close(classification.cross_entropy(logits, targets), [math.log(4)])
    close(classification.soft_cross_entropy(logits, jnp.array([[9.0, -3, 0, 1]])), [math.log(4)])
    sure = jnp.array([[0.0, math.log(3.0)]])  # softmax 1/4, 3/4
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    close(classification.soft_cross_entropy(sure, sure), [entropy])


def test_cross_entropies_equal_torch():
    torch = pytest.importorskip("torch")
    logits, teacher, labels = numbers()
    t_logits, t_teacher, t_labels = map(torch.from_numpy, (logits, teacher, labels))
    close(
        classification.soft_cross_entropy(jnp.array(logits), jnp.array(teacher)),
        -(t_teacher.softmax(-1) * t_logits.log_softmax(-1)).sum(-1),
    )
    for smoothing in (0.0, 0.1, 0.5):
        targets = classification.label_targets(jnp.array(labels), C, smoothing, jnp.float64)
        ours = classification.cross_entropy(jnp.array(logits), targets)
        close(
            ours,
            torch.nn.functional.cross_entropy(
                t_logits, t_labels, label_smoothing=smoothing, reduction="none"
            ),
        )
        log_probabilities = t_logits.log_softmax(-1)  # timm's LabelSmoothingCrossEntropy
        of_label = log_probabilities.gather(-1, t_labels[:, None])[:, 0]
        timm = -(1 - smoothing) * of_label - smoothing * log_probabilities.mean(-1)
        close(ours, timm)


@pytest.mark.parametrize("weight", [0.0, 0.9, 1.0])
def test_training_loss_and_gradient_equal_torch(weight):
    torch = pytest.importorskip("torch")
    logits, teacher, labels = numbers(1)

    def loss(x):
        return classification.training_loss(
            (x,),
            jnp.array(labels),
            jnp.array(teacher),
            distillation_weight=weight,
            label_smoothing=0.1,
        )

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.array(logits))
    x = torch.from_numpy(logits).requires_grad_()
    distillation = -(torch.from_numpy(teacher).softmax(-1) * x.log_softmax(-1)).sum(-1).mean()
    label = torch.nn.functional.cross_entropy(x, torch.from_numpy(labels), label_smoothing=0.1)
    expected = weight * distillation + (1 - weight) * label
    expected.backward()
    close(value, expected.item())
    close(gradient, x.grad)
    close(terms["distillation_loss"], distillation.item())
    assert ("label_loss" in terms) == (weight < 1)
    if weight < 1:
        close(terms["label_loss"], label.item())


@pytest.mark.parametrize("weight", [0.0, 0.9])
def test_soft_labels_are_not_smoothed_again(weight):
    torch = pytest.importorskip("torch")
    logits, teacher, labels = numbers(8)
    targets = np.asarray(classification.label_targets(jnp.array(labels), C, 0.1, jnp.float64))
    targets = 0.3 * targets + 0.7 * targets[::-1]
    loss, terms = classification.training_loss(
        (jnp.array(logits),),
        jnp.array(labels),
        jnp.array(teacher),
        distillation_weight=weight,
        label_smoothing=0.1,
        targets=jnp.array(targets),
    )
    x = torch.from_numpy(logits)
    label = torch.nn.functional.cross_entropy(x, torch.from_numpy(targets))
    distillation = torch.nn.functional.cross_entropy(x, torch.from_numpy(teacher).softmax(-1))
    close(terms["label_loss"], label.item())
    close(loss, weight * distillation.item() + (1 - weight) * label.item())


def test_without_a_teacher_only_the_labels_count():
    logits, _, labels = numbers(2)
    loss, terms = classification.training_loss(
        (jnp.array(logits),), jnp.array(labels), None, distillation_weight=1.0, label_smoothing=0.0
    )
    log_probabilities = jax.nn.log_softmax(jnp.array(logits))
    close(loss, -np.mean(np.asarray(log_probabilities)[np.arange(B), labels]))
    assert list(terms) == ["label_loss"]


def test_gradient_is_the_derivative():
    logits, teacher, labels = numbers(3)

    def loss(x):
        return classification.training_loss(
            (x,),
            jnp.array(labels),
            jnp.array(teacher),
            distillation_weight=0.9,
            label_smoothing=0.1,
        )[0]

    check_grads(jax.jit(loss), (logits,), order=1, modes=("rev",), rtol=1e-6)


def test_labels_go_to_the_first_head_and_hard_targets_to_the_last():
    torch = pytest.importorskip("torch")
    logits, teacher, labels = numbers(6)
    other = numbers(7)[0]
    loss, terms = classification.training_loss(
        (jnp.array(logits), jnp.array(other)),
        jnp.array(labels),
        jnp.array(teacher),
        teacher_targets="hard",
        distillation_weight=0.25,
        label_smoothing=0.1,
    )
    cross_entropy = torch.nn.functional.cross_entropy
    label = cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), label_smoothing=0.1)
    distillation = cross_entropy(torch.from_numpy(other), torch.from_numpy(teacher).argmax(-1))
    close(terms["label_loss"], label.item())
    close(terms["distillation_loss"], distillation.item())
    close(loss, 0.25 * distillation.item() + 0.75 * label.item())


@pytest.mark.parametrize(
    ("dtype", "inside"),
    [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_computed_in_float32_or_wider(dtype, inside):
    logits, teacher, labels = (jnp.array(x) for x in numbers(4))
    logits = logits.astype(dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        loss, _ = classification.training_loss(
            (logits,),
            labels,
            teacher.astype(jnp.bfloat16),
            distillation_weight=0.9,
            label_smoothing=0.1,
        )
        assert classification.topk_correct(logits, labels, 2).dtype == bool
    assert loss.dtype == inside


def test_topk_agrees_with_sorting():
    logits, _, labels = numbers(5)
    order = np.argsort(-logits, axis=-1)
    for k in range(1, C + 3):
        expected = [label in row[:k] for row, label in zip(order, labels)]
        got = classification.topk_correct(jnp.array(logits), jnp.array(labels), k)
        assert got.tolist() == expected
    assert all(classification.topk_correct(jnp.array(logits), jnp.array(labels), 100))


@pytest.mark.slow
def test_topk_of_ties_and_nans():
    ties = jnp.ones((4, 4))
    labels = jnp.arange(4)
    assert classification.topk_correct(ties, labels, 2).tolist() == [True, True, False, False]
    nans = jnp.full((4, 4), jnp.nan)
    assert not classification.topk_correct(nans, labels, 3).any()
    one = jnp.array([[jnp.nan, 2.0, 1.0]])
    assert classification.topk_correct(one, jnp.array([1]), 1).tolist() == [False]
    assert classification.topk_correct(one, jnp.array([1]), 2).tolist() == [True]
