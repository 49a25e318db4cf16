"""The training step: loss, gradient, accumulation over microbatches, update."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array, lax
from jax.sharding import Mesh

from bvit_jax.augment.mixing import dominant_labels, mix_targets
from bvit_jax.augment.normalization import Normalization
from bvit_jax.losses.attention import Ranking, attention_loss
from bvit_jax.losses.classification import TeacherTargets, topk_correct, training_loss
from bvit_jax.losses.regularization import Regularization, block_kernels, distance_to_one
from bvit_jax.models.head import ModelOutput
from bvit_jax.optim import global_norm
from bvit_jax.runtime.mesh import replicated
from bvit_jax.training.steps.batch import Batch, Examples, Inputs
from bvit_jax.training.steps.keys import MICROBATCHES_KEY, RANKING_KEY
from bvit_jax.training.steps.precision import DEFAULT, precise
from bvit_jax.training.steps.state import TrainState

Metrics = dict[str, Array]


@dataclass(frozen=True)
class Objective:
    """The terms of the loss.

    Attributes:
      teacher: the model that is distilled; None without one. It runs in evaluation mode, without gradient.
      teacher_normalize: how it was trained to see images; None for the student's normalisation.
      teacher_targets: whether its probabilities are the targets, or the class that it prefers.
      distillation_weight: share of the distillation loss; the labels have what this and regularization leave.
      label_smoothing: of the labels, from 0 to 1.
      ranking: the term that compares attention, which needs a teacher; None for none. With a
        ``distillation_weight`` of 0 the teacher's logits then do not count.
      regularization: the term that draws the weights of the blocks to ±1; None for none.
      teacher_precision: of the teacher's products of float32 numbers; its probabilities are the targets.
    """

    teacher: nn.Module | None = None
    teacher_normalize: Normalization | None = None
    teacher_targets: TeacherTargets = "soft"
    distillation_weight: float = 1.0
    label_smoothing: float = 0.1
    ranking: Ranking | None = None
    regularization: Regularization | None = None
    teacher_precision: str = DEFAULT


@dataclass(frozen=True)
class TrainSettings:
    """What a training step is made of.

    Attributes:
      model: the student.
      optimizer: applied to the mean gradient of the batch.
      inputs: how images reach the student.
      objective: the loss.
      accumulate_steps: microbatches that the augmented batch is divided into. They pass through the models
        one after the other; gradient and metrics are their means. Batch norms take the statistics of each
        microbatch, and their running statistics advance as many times.
      ema_decay: d of the moving average, which becomes ``d · average + (1 - d) · new``, as in timm's
        ``ModelEma``, for parameters and running statistics; used where the state has an average.
      mesh: needed where arrays are sharded. Microbatches are then spread over it as the batch is, and
        parameters that are spread over devices are gathered for their use.
      matmul_precision: of products of float32 numbers, see `bvit_jax.training.steps.precision`.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    inputs: Inputs
    objective: Objective = Objective()
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    mesh: Mesh | None = None
    matmul_precision: str = DEFAULT


class Outcome(NamedTuple):
    """What the loss of some images leaves in addition to its value.

    Attributes:
      terms: of the loss, scalars.
      logits: [B, classes].
      batch_stats: the next running statistics.
    """

    terms: Metrics
    logits: Array
    batch_stats: Any


def train_step(
    settings: TrainSettings, state: TrainState, batch: Batch, teacher_variables: Any, key: Array
) -> tuple[TrainState, Metrics]:
    """Returns the next state and the metrics of a step.

    Args:
      settings: of the step.
      state: before it.
      batch: ``image``, uint8 [B, H, W, 3], and ``label``, int32 [B].
      teacher_variables: empty without a teacher.
      key: of training; the step is folded in.

    Returns:
      The state, and scalars: ``loss`` and, where there are several, its terms; ``train_top1`` in training
      mode, by the label with the larger share where labels are mixed; ``gradient_norm``.
    """
    examples, step_key = settings.inputs.examples(batch, key, state.step)
    params = state.params
    if settings.mesh is not None:
        params = lax.with_sharding_constraint(params, replicated(settings.mesh))
    if settings.accumulate_steps == 1:
        (value, outcome), grads = gradient(
            params, settings, state.batch_stats, examples, teacher_variables, step_key, state.step
        )
        metrics, batch_stats = metrics_of(value, outcome, examples), outcome.batch_stats
    else:
        micro_key = jax.random.fold_in(step_key, MICROBATCHES_KEY)
        grads, batch_stats, metrics = accumulate(
            params, settings, state.batch_stats, examples, teacher_variables, micro_key, state.step
        )
    return update(settings, state, grads, batch_stats), {**metrics, "gradient_norm": global_norm(grads)}


def loss(
    params: Any,
    settings: TrainSettings,
    batch_stats: Any,
    examples: Examples,
    teacher_variables: Any,
    key: Array,
    step: Array,
) -> tuple[Array, Outcome]:
    """Returns the loss of images that pass through the models together; ``key`` is that of dropout."""
    objective = settings.objective
    images = settings.inputs.normalize(examples.pictures)
    capture: dict[str, Any] = {} if objective.ranking is None else {"capture": True}
    taught: ModelOutput | None = None
    if objective.teacher is not None:
        normalize = objective.teacher_normalize
        seen = images if normalize is None else normalize(examples.pictures)
        with precise(objective.teacher_precision):
            taught = cast(ModelOutput, objective.teacher.apply(teacher_variables, seen, **capture))
    output, updates = settings.model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
        **capture,
    )
    value, terms = total_loss(objective, params, output, taught, examples, key, step)
    return value, Outcome(terms, output.logits, updates.get("batch_stats", {}))


# Of (params, ...) as `loss` takes them; returns ((loss, Outcome), gradient of params).
gradient = jax.value_and_grad(loss, has_aux=True)


def total_loss(
    objective: Objective,
    params: Any,
    output: ModelOutput,
    taught: ModelOutput | None,
    examples: Examples,
    key: Array,
    step: Array,
) -> tuple[Array, Metrics]:
    """Returns the loss of the student's parameters and of both models' outputs, and its terms."""
    labels, weight = examples.labels, objective.distillation_weight
    regularization = objective.regularization
    regularized = 0.0 if regularization is None else regularization.weight_at(step)
    targets = None
    if examples.lam is not None:
        classes, smoothing = output.logits.shape[-1], objective.label_smoothing
        targets = mix_targets(labels, examples.lam, classes, smoothing, examples.partners)
    uses_logits = taught is not None and (weight > 0 or objective.ranking is None)
    value, terms = training_loss(
        output.head_logits,
        labels,
        taught.logits if taught is not None and uses_logits else None,
        teacher_targets=objective.teacher_targets,
        distillation_weight=weight,
        label_smoothing=objective.label_smoothing,
        targets=targets,
        other_weight=regularized,
    )
    if regularization is not None:
        terms["regularization_loss"] = distance_to_one(block_kernels(params))
        value += regularized * terms["regularization_loss"]
    ranking = objective.ranking
    if ranking is not None and taught is not None:
        ranking_key = jax.random.fold_in(key, RANKING_KEY)
        terms["ranking_loss"] = attention_loss(
            ranking, output.probabilities, taught.probabilities, ranking_key, labels.shape[0]
        )
        value += ranking.weight * terms["ranking_loss"]
    return value, terms


def metrics_of(value: Array, outcome: Outcome, examples: Examples) -> Metrics:
    """Returns the scalars that are logged of a loss."""
    shown = examples.labels
    if examples.lam is not None:
        shown = dominant_labels(examples.labels, examples.lam, examples.partners)
    return {
        "loss": value,
        **(outcome.terms if len(outcome.terms) > 1 else {}),
        "train_top1": jnp.mean(topk_correct(outcome.logits, shown, 1), dtype=jnp.float32),
    }


def accumulate(
    params: Any,
    settings: TrainSettings,
    batch_stats: Any,
    examples: Examples,
    teacher_variables: Any,
    key: Array,
    step: Array,
) -> tuple[Any, Any, Metrics]:
    """Returns gradient, running statistics and metrics over microbatches, one after the other."""
    count = settings.accumulate_steps

    def body(carry: tuple[Any, Any], index: Array) -> tuple[tuple[Any, Any], Metrics]:
        total, batch_stats = carry
        part = examples.microbatch(index, count, settings.mesh)
        (value, outcome), grads = gradient(
            params, settings, batch_stats, part, teacher_variables, jax.random.fold_in(key, index), step
        )
        return (jax.tree.map(jnp.add, total, grads), outcome.batch_stats), metrics_of(value, outcome, part)

    zeros = jax.tree.map(jnp.zeros_like, params)
    (total, batch_stats), metrics = lax.scan(body, (zeros, batch_stats), jnp.arange(count))
    grads = jax.tree.map(lambda g: g / count, total)
    return grads, batch_stats, {name: jnp.mean(values) for name, values in metrics.items()}


def update(settings: TrainSettings, state: TrainState, grads: Any, batch_stats: Any) -> TrainState:
    """Returns the state after a step of the optimiser, and of the moving average where there is one."""
    updates, opt_state = settings.optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = moving_average(ema, {"params": params, "batch_stats": batch_stats}, settings.ema_decay)
    return dataclasses.replace(
        state, step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
    )


def moving_average(average: Any, new: Any, decay: float) -> Any:
    """Returns ``decay · average + (1 - decay) · new`` of two trees of one structure."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, new)
