"""The pure steps of training and evaluation, and what they compile to on a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from bvit_jax.augmentation import NO_AUGMENTATION, Augmentation
from bvit_jax.losses import TeacherTargets, cross_entropy, label_targets, topk_correct, training_loss
from bvit_jax.mixing import dominant_labels, mix_targets
from bvit_jax.models.head import ModelOutput
from bvit_jax.normalization import Normalization
from bvit_jax.sharding import batch_sharded, replicated
from bvit_jax.train_state import TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Variables = Mapping[str, Any]
TrainStep = Callable[[TrainState, Batch, Variables, Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[Variables, Batch], Metrics]


def step_keys(key: Array, step: Array | int) -> tuple[Array, Array]:
    """Returns the keys of dropout and of augmentation in a step, from the key of the run.

    ``step`` counts the steps taken before it, as `TrainState.step` does.
    """
    step_key = jax.random.fold_in(key, step)
    return step_key, jax.random.fold_in(step_key, 1)


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
    augmentation: Augmentation = NO_AUGMENTATION,
    gather: Callable[[Any], Any] = lambda params: params,
) -> TrainStep:
    """Returns the pure training step.

    The step takes the state, a batch of ``image`` (uint8) and ``label`` (int32), the teacher's
    variables (empty without one) and the key of the run, of which it folds in the step. It returns
    the next state and scalar metrics: the loss and its terms, the top-1 of the batch in training
    mode, and the norm of the gradient. The teacher sees the same augmented images, normalised as it
    was trained with, in evaluation mode, without gradient. Where images are mixed, so are the labels,
    and the top-1 asks for the label with the larger share. ``gather`` brings parameters that are spread
    over devices together for their use.
    """

    def train_step(
        state: TrainState, batch: Batch, teacher_variables: Variables, key: Array
    ) -> tuple[TrainState, Metrics]:
        dropout_key, augmentation_key = step_keys(key, state.step)
        rngs = {"dropout": dropout_key}
        pictures, lam = augmentation(augmentation_key, batch["image"], normalize)
        images, labels = normalize(pictures), batch["label"]
        teacher_logits = None
        if teacher is not None:
            seen = images if teacher_normalize is None else teacher_normalize(pictures)
            output: ModelOutput = teacher.apply(teacher_variables, seen)  # type: ignore[assignment]
            teacher_logits = output.logits

        def loss_of(params: Any) -> tuple[Array, tuple[Metrics, Array, Any]]:
            output, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs=rngs,
            )
            targets = labels
            if lam is not None:
                targets = mix_targets(labels, lam, output.logits.shape[-1], label_smoothing)
            loss, terms = training_loss(
                output.head_logits,
                targets,
                teacher_logits,
                teacher_targets=teacher_targets,
                distillation_weight=distillation_weight,
                label_smoothing=label_smoothing,
            )
            return loss, (terms, output.logits, updates.get("batch_stats", {}))

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (terms, logits, batch_stats)), grads = gradient(gather(state.params))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        shown = labels if lam is None else dominant_labels(labels, lam)
        metrics = {
            "loss": loss,
            **(terms if len(terms) > 1 else {}),
            "train_top1": jnp.mean(topk_correct(logits, shown, 1), dtype=jnp.float32),
            "gradient_norm": optax.tree.norm(grads),
        }
        return dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        ), metrics

    return train_step


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


def default_images_at_once(mesh: Mesh) -> int:
    """Returns the group size of `make_eval_step` that measured best: 2 on one CPU, else no groups."""
    return 2 if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu" else 0


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
