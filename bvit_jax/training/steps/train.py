"""The pure steps of training and evaluation, and what they compile to on a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array, lax
from jax.sharding import Mesh

from bvit_jax.augment.augmentation import NO_AUGMENTATION, Augmentation
from bvit_jax.augment.mixing import dominant_labels, mix_targets
from bvit_jax.augment.normalization import Normalization
from bvit_jax.losses.classification import (
    TeacherTargets,
    cross_entropy,
    label_targets,
    topk_correct,
    training_loss,
)
from bvit_jax.losses.ranking import Ranking, ranking_loss
from bvit_jax.models.head import ModelOutput
from bvit_jax.optim import global_norm
from bvit_jax.runtime.mesh import batch_sharded, replicated
from bvit_jax.training.steps.state import TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Variables = Mapping[str, Any]
TrainStep = Callable[[TrainState, Batch, Variables, Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[Variables, Batch], Metrics]


# What is folded into the key of a step; the key itself is that of dropout.
AUGMENTATION_KEY, MICROBATCHES_KEY, RANKING_KEY = 1, 2, 3


def step_keys(key: Array, step: Array | int) -> tuple[Array, Array]:
    """Returns the keys of dropout and of augmentation in a step, from the key of the run.

    ``step`` counts the steps taken before it, as `TrainState.step` does.
    """
    step_key = jax.random.fold_in(key, step)
    return step_key, jax.random.fold_in(step_key, AUGMENTATION_KEY)


class Examples(NamedTuple):
    """The images of a step and what is known of them; every array has the batch as its first axis.

    Attributes:
      pictures: augmented, not normalised, [B, H, W, 3].
      labels: int32 [B].
      partners: the labels of the images that are mixed in, int32 [B]; None where nothing is mixed.
      lam: the images' own shares, float32 [B] or [1]; None where nothing is mixed.
    """

    pictures: Array
    labels: Array
    partners: Array | None
    lam: Array | None

    def microbatch(self, index: Array, count: int, mesh: Mesh | None) -> "Examples":
        """Returns every ``count``-th image, from ``index`` on.

        A device that holds consecutive images then holds as many of each microbatch, and none moves.
        """

        def take(array: Array) -> Array:
            part = lax.dynamic_index_in_dim(
                array.reshape(-1, count, *array.shape[1:]), index, axis=1, keepdims=False
            )
            return part if mesh is None else lax.with_sharding_constraint(part, batch_sharded(mesh))

        whole = self
        if self.lam is not None:
            whole = self._replace(lam=jnp.broadcast_to(self.lam, self.labels.shape))
        return jax.tree.map(take, whole)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    normalize: Normalization,
    *,
    teacher: nn.Module | None = None,
    teacher_normalize: Normalization | None = None,
    teacher_targets: TeacherTargets = "soft",
    distillation_weight: float = 1.0,
    label_smoothing: float = 0.1,
    ranking: Ranking | None = None,
    augmentation: Augmentation = NO_AUGMENTATION,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    mesh: Mesh | None = None,
) -> TrainStep:
    """Returns the pure training step.

    The step takes the state, a batch of ``image`` (uint8) and ``label`` (int32), the teacher's
    variables (empty without one) and the key of the run, of which it folds in the step. It returns
    the next state and scalar metrics: the loss and its terms, the top-1 of the batch in training
    mode, and the norm of the gradient. The teacher sees the same augmented images, normalised as it
    was trained with, in evaluation mode, without gradient. Where images are mixed, so are the labels,
    and the top-1 asks for the label with the larger share.

    With ``ranking``, which needs a teacher, the loss has `bvit_jax.losses.ranking.ranking_loss` of the
    attention
    probabilities as one more term; a ``distillation_weight`` of 0 then leaves the teacher's logits out.

    With ``accumulate_steps`` k above 1 the batch, augmented as a whole, passes through the models in k
    microbatches, one after the other; gradient and metrics are the means of theirs. Batch norms take the
    statistics of each microbatch, and the running statistics advance k times. ``mesh`` is needed where
    arrays are sharded: microbatches are then spread over it as the batch is, and parameters that are spread
    over devices are brought together for their use.

    With ``ema_decay`` d above 0 the state's moving average becomes ``d · average + (1 - d) · new``, of
    the parameters and of the running statistics, as timm's ``ModelEma`` does.
    """

    def gather(params: Any) -> Any:
        return params if mesh is None else lax.with_sharding_constraint(params, replicated(mesh))

    def loss_and_gradient(
        params: Any, batch_stats: Any, examples: Examples, teacher_variables: Variables, key: Array
    ) -> tuple[Any, Any, Metrics]:
        """Returns the gradient, the next running statistics and metrics of images that fit at once."""
        pictures, labels, partners, lam = examples
        images = normalize(pictures)
        capture: Any = {} if ranking is None else {"capture": True}
        teacher_logits, taught = None, None
        if teacher is not None:
            seen = images if teacher_normalize is None else teacher_normalize(pictures)
            taught = cast(ModelOutput, teacher.apply(teacher_variables, seen, **capture))
            teacher_logits = taught.logits if distillation_weight > 0 or ranking is None else None

        def loss_of(params: Any) -> tuple[Array, tuple[Metrics, Array, Any]]:
            output, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
                **capture,
            )
            targets = labels
            if lam is not None:
                targets = mix_targets(labels, lam, output.logits.shape[-1], label_smoothing, partners)
            loss, terms = training_loss(
                output.head_logits,
                targets,
                teacher_logits,
                teacher_targets=teacher_targets,
                distillation_weight=distillation_weight,
                label_smoothing=label_smoothing,
            )
            if ranking is not None and taught is not None:
                terms["ranking_loss"] = ranking_loss(
                    ranking.chosen(output.probabilities, labels.shape[0]),
                    ranking.chosen(taught.probabilities, labels.shape[0]),
                    jax.random.fold_in(key, RANKING_KEY),
                    margin=ranking.margin,
                )
                loss += ranking.weight * terms["ranking_loss"]
            return loss, (terms, output.logits, updates.get("batch_stats", {}))

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (terms, logits, new_stats)), grads = gradient(params)
        shown = labels if lam is None else dominant_labels(labels, lam, partners)
        metrics = {
            "loss": loss,
            **(terms if len(terms) > 1 else {}),
            "train_top1": jnp.mean(topk_correct(logits, shown, 1), dtype=jnp.float32),
        }
        return grads, new_stats, metrics

    def accumulated(
        state: TrainState, examples: Examples, teacher_variables: Variables, key: Array
    ) -> tuple[Any, Any, Metrics]:
        """Returns what ``loss_and_gradient`` does, from one microbatch at a time."""
        params = gather(state.params)

        def body(carry: tuple[Any, Any], index: Array) -> tuple[tuple[Any, Any], Metrics]:
            total, batch_stats = carry
            grads, batch_stats, metrics = loss_and_gradient(
                params,
                batch_stats,
                examples.microbatch(index, accumulate_steps, mesh),
                teacher_variables,
                jax.random.fold_in(key, index),
            )
            return (jax.tree.map(jnp.add, total, grads), batch_stats), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        indices = jnp.arange(accumulate_steps)
        (total, batch_stats), metrics = lax.scan(body, (zeros, state.batch_stats), indices)
        grads = jax.tree.map(lambda g: g / accumulate_steps, total)
        return grads, batch_stats, {name: jnp.mean(values) for name, values in metrics.items()}

    def train_step(
        state: TrainState, batch: Batch, teacher_variables: Variables, key: Array
    ) -> tuple[TrainState, Metrics]:
        step_key, augmentation_key = step_keys(key, state.step)
        pictures, lam = augmentation(augmentation_key, batch["image"], normalize)
        labels = batch["label"]
        examples = Examples(pictures, labels, None if lam is None else labels[::-1], lam)
        if accumulate_steps == 1:
            grads, batch_stats, metrics = loss_and_gradient(
                gather(state.params), state.batch_stats, examples, teacher_variables, step_key
            )
        else:
            micro_key = jax.random.fold_in(step_key, MICROBATCHES_KEY)
            grads, batch_stats, metrics = accumulated(state, examples, teacher_variables, micro_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = moving_average(ema, {"params": params, "batch_stats": batch_stats}, ema_decay)
        metrics = {**metrics, "gradient_norm": global_norm(grads)}
        return dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=ema,
        ), metrics

    return train_step


def moving_average(average: Any, new: Any, decay: float) -> Any:
    """Returns ``decay · average + (1 - decay) · new`` of two like trees."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, new)


def make_eval_step(model: nn.Module, normalize: Normalization, *, images_at_once: int = 0) -> EvalStep:
    """Returns the pure evaluation step.

    It takes variables and a batch of ``image``, ``label``, ``mask`` and ``bad``, and returns sums over
    the images that the mask keeps: ``top1``, ``top5``, ``loss`` (cross-entropy with the labels) and
    their number, ``images``; and the number of ``bad_images``, which could not be decoded.

    Args:
      model: the model.
      normalize: from uint8 images to the model's input.
      images_at_once: if above 0 and a divisor of the batch, images go through the model in groups of
        this size, one after the other: a CPU keeps their activations in its caches.
    """

    def logits_of(variables: Variables, images: Array) -> Array:
        output: ModelOutput = model.apply(variables, normalize(images))  # type: ignore[assignment]
        return output.logits

    def eval_step(variables: Variables, batch: Batch) -> Metrics:
        images, labels, mask = batch["image"], batch["label"], batch["mask"]
        if images_at_once and images.shape[0] % images_at_once == 0:
            groups = images.reshape(-1, images_at_once, *images.shape[1:])
            logits = jax.lax.map(partial(logits_of, variables), groups)
            logits = logits.reshape(images.shape[0], -1)
        else:
            logits = logits_of(variables, images)
        targets = label_targets(labels, logits.shape[-1], 0.0, logits.dtype)

        def total(values: Array) -> Array:
            return jnp.sum(jnp.where(mask, values, 0), dtype=jnp.float32)

        return {
            "top1": total(topk_correct(logits, labels, 1)),
            "top5": total(topk_correct(logits, labels, 5)),
            "loss": total(cross_entropy(logits, targets)),
            "images": total(mask),
            "bad_images": jnp.sum(batch["bad"] >= 0),
        }

    return eval_step


def jit_train_step(step: TrainStep, mesh: Mesh, state: Any = None, *, donate: bool = True) -> Any:
    """Compiles a training step for a mesh.

    Args:
      step: the pure step.
      mesh: the batch is spread over it; the teacher and the metrics are whole on every device.
      state: shardings of the training state; by default it is whole on every device.
      donate: whether the new state takes the memory of the old one.
    """
    whole = replicated(mesh)
    state = whole if state is None else state
    return jax.jit(
        step,
        in_shardings=(state, batch_sharded(mesh), whole, whole),
        out_shardings=(state, whole),
        donate_argnums=(0,) if donate else (),
    )


def jit_eval_step(step: EvalStep, mesh: Mesh) -> Any:
    """Compiles an evaluation step for a mesh."""
    whole = replicated(mesh)
    return jax.jit(step, in_shardings=(whole, batch_sharded(mesh)), out_shardings=whole)
