"""The teacher of a run: whether its configuration needs one, and whether it fits the student."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from bvit_jax import models, weights
from bvit_jax.augment.normalization import Normalization
from bvit_jax.errors import UserError
from bvit_jax.files import local_path
from bvit_jax.losses.attention import Ranking
from bvit_jax.weights.pretrained import Pretrained


@dataclass(frozen=True)
class Teacher:
    """The distillation teacher: an argument of the step, neither trained nor checkpointed.

    Attributes:
      model: None where there is no teacher.
      variables: empty where there is none.
      digest: SHA-256 of the weights; a run resumes only with the same teacher.
      normalize: the normalisation of its images, which may differ from the student's.
    """

    model: nn.Module | None
    variables: dict[str, Any]
    digest: str
    normalize: Normalization | None


def load_teacher(config: ConfigDict) -> Teacher:
    """Loads the teacher that ``config.teacher`` names.

    Raises:
      UserError: distillation or ranking is asked for without a teacher or the other way round; it cannot
        be read, or has other classes or another image size than the student.
    """
    path, needed = config.teacher.path, needs_teacher(config)
    if needed and not path:
        settings = ("distillation_weight", "ranking_weight")
        asking = [f"config.loss.{name}=0" for name in settings if config.loss[name] > 0]
        raise UserError(
            "config.teacher.path is empty; name the teacher's directory, or train on the labels with"
            f" {' and '.join(asking)}"
        )
    if path and not needed:
        raise UserError(
            "config.loss.distillation_weight is 0, so that the teacher would do nothing; raise it or"
            " config.loss.ranking_weight, or leave config.teacher.path empty"
        )
    check_heads(config)
    if not path:
        return Teacher(None, {}, "", None)
    origin = local_path(config.teacher.path)
    try:
        teacher = finite(weights.load(origin), origin)
    except UserError as error:
        raise UserError(f"config.teacher.path: {error}") from error
    for key in ("num_classes", "image_size"):
        if teacher.config[key] != config.model[key]:
            raise UserError(
                f"the teacher in {origin} has {key} {teacher.config[key]} and the student"
                f" {config.model[key]}; use another config.teacher.path or config.model.{key}"
            )
    p = teacher.preprocessing
    execution = models.Execution(scan_blocks=config.scan_blocks is True)
    model = models.create_model(teacher.config, jnp.dtype(config.compute_dtype), execution)
    return Teacher(model, teacher.arrays(), teacher.digest(), Normalization(p.mean, p.std))


def finite(source: Pretrained, path: Path) -> Pretrained:
    """Returns what was read from a path; raises `UserError` if a value of it is NaN or infinite."""
    if bad := source.not_finite():
        raise UserError(
            f"{path} holds NaN or infinite values in {len(bad)} arrays, such as {bad[0]}; use another file"
        )
    return source


def needs_teacher(config: ConfigDict) -> bool:
    """Returns whether a term of the loss asks for a teacher."""
    return config.loss.distillation_weight > 0 or config.loss.ranking_weight > 0


def check_heads(config: ConfigDict) -> None:
    """Raises `UserError` if the model has a head for a teacher and one for labels, and trains only one."""
    if config.model.get("distillation_head") and not 0 < config.loss.distillation_weight < 1:
        raise UserError(
            "config.model.distillation_head needs a teacher for one head and labels for the other; set"
            " config.loss.distillation_weight between 0 and 1, such as 0.5"
        )


def make_ranking(config: ConfigDict, student: nn.Module, teacher: nn.Module | None) -> Ranking | None:
    """Returns the ranking term that ``config.loss`` asks for, None where it asks for none.

    Raises:
      UserError: it names blocks that a model does not have, or student and teacher differ in their blocks,
        tokens or keys.
    """
    loss = config.loss
    if not loss.ranking_weight or teacher is None:
        return None
    sides = {"student": _attention_shapes(student), "teacher": _attention_shapes(teacher)}
    layers = tuple(loss.ranking_layers)
    for side, shapes in sides.items():
        if layers and max(layers) >= len(shapes):
            raise UserError(
                f"config.loss.ranking_layers is {layers}, and the {side} has {len(shapes)} blocks; expected"
                f" numbers below {len(shapes)}"
            )
    ours, theirs = sides.values()
    if not layers and len(ours) != len(theirs):
        raise UserError(
            f"config.loss.ranking_weight is {loss.ranking_weight}, and the student has {len(ours)} blocks,"
            f" the teacher {len(theirs)}; use another teacher, or name blocks with config.loss.ranking_layers"
        )
    for layer in layers or range(len(ours)):
        (*_, tokens, keys), (*_, teacher_tokens, teacher_keys) = ours[layer], theirs[layer]
        windows, teacher_windows = ours[layer][0], theirs[layer][0]
        if (windows, tokens, keys) != (teacher_windows, teacher_tokens, teacher_keys):
            raise UserError(
                f"config.loss.ranking_weight is {loss.ranking_weight}, and block {layer} of the student has"
                f" {_in_words(ours[layer])}, that of the teacher {_in_words(theirs[layer])}; use a teacher"
                " with the student's tokens (image and patch size, class and distillation tokens, windows),"
                " or leave the block out of config.loss.ranking_layers"
            )
    kind, margin, top = loss.ranking_kind, loss.ranking_margin, loss.ranking_top
    return Ranking(loss.ranking_weight, kind, margin, top, layers, loss.ranking_every)


def _attention_shapes(model: Any) -> list[tuple[int, ...]]:
    """Returns (windows, heads, tokens, keys) of each block, windows being 1 without any."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))

    def run(key: Array) -> Sequence[Array]:
        return model.apply(model.init(key, images), images, capture=True).probabilities

    return [x.shape for x in jax.eval_shape(run, jax.random.key(0))]


def _in_words(shape: tuple[int, ...]) -> str:
    windows, _, tokens, keys = shape
    return f"{tokens} tokens and {keys} keys" + (f" in each of {windows} windows" if windows > 1 else "")
