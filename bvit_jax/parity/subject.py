"""The subject of a golden file: our model for it, the names of its arrays, and its training loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.losses import classification
from bvit_jax.losses.regularization import block_kernels, distance_to_one
from bvit_jax.models import ModelOutput
from bvit_jax.parity.reference import bhvit_config, config_of
from bvit_jax.weights.formats import FORMATS, Format, bhvit, bivit, reference, timm

Targets = Mapping[str, Array]  # ``teacher_logits`` and, if there are any, ``labels``
Loss = Callable[[ModelOutput, Targets, Any], Array]


@dataclass(frozen=True)
class Subject:
    """The model of a golden file.

    Attributes:
      config: the configuration of our model.
      file_format: the format whose names the arrays have.
      loss: from the model's output, the targets of the batch and the parameters to a scalar.
    """

    config: ConfigDict
    file_format: Format
    loss: Loss


def subject_of(meta: Mapping[str, Any]) -> Subject:
    """Returns the subject of a golden file, which may be of the BinaryViT code or of Bi-ViT's.

    Raises:
      UserError: its ``meta`` describes no such model.
    """
    if "kwargs" in meta:
        return _bivit(meta)
    if meta.get("model_type") == bhvit.MODEL_TYPE:
        return _bhvit(meta)
    return Subject(config_of(meta), FORMATS[reference.NAME], _distillation)


def _distillation(output: ModelOutput, targets: Targets, params: Any) -> Array:
    del params
    return jnp.mean(classification.soft_cross_entropy(output.logits, targets["teacher_logits"]))


def _two_heads(output: ModelOutput, targets: Targets, params: Any) -> Array:
    del params
    value, _ = classification.training_loss(
        output.head_logits,
        targets["labels"],
        targets["teacher_logits"],
        teacher_targets="hard",
        distillation_weight=0.5,
        label_smoothing=0.0,
    )
    return value


# --- BHViT's code ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _WeightedLoss:
    """The sum of distillation, cross-entropy and regularisation of the weights of the blocks."""

    kd: float = 0.0
    ce: float = 0.0
    regularization: float = 0.0

    def __call__(self, output: ModelOutput, targets: Targets, params: Any) -> Array:
        loss = self.kd * _distillation(output, targets, params)
        if self.ce:
            logits = output.logits
            one_hot = classification.label_targets(targets["labels"], logits.shape[-1], 0.0, logits.dtype)
            loss += self.ce * jnp.mean(classification.cross_entropy(logits, one_hot))
        if self.regularization:
            loss += self.regularization * distance_to_one(block_kernels(params))
        return loss


def _bhvit(meta: Mapping[str, Any]) -> Subject:
    config = bhvit_config(meta)
    try:
        loss = _WeightedLoss(**meta["loss_weights"])
    except (KeyError, TypeError) as error:
        raise UserError(f"the golden file's meta has no or unknown loss_weights: {error}") from error
    return Subject(config, FORMATS[bhvit.NAME], loss)


# --- Bi-ViT's code: DeiT and Swin, real-valued in the names of timm and Microsoft, and binary ------

_SHARED = {"img_size": "image_size", "patch_size": "patch_size", "num_classes": "num_classes"}
_DEIT = _SHARED | {"embed_dim": "width", "depth": "depth", "num_heads": "num_heads"}
_SWIN = _SHARED | {
    "embed_dim": "width",
    "depths": "depth",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "drop_path_rate": "drop_path",
}
_MLP_RATIO = 4


# Per case: our model, and the format whose names its arrays have.
_CASES = {
    "deit_distilled": ("deit", timm.NAME),
    "bivit_deit": (bivit.DEIT, bivit.NAME),
    "bivit_deit_nodist": (bivit.DEIT, bivit.NAME),
    "swin": ("swin", timm.MICROSOFT),
    "bivit_swin": (bivit.SWIN, bivit.NAME),
}


def _bivit(meta: Mapping[str, Any]) -> Subject:
    try:
        case = meta["case"]
        if case not in _CASES:
            raise UserError(f"the golden file's case is {case!r}; expected one of {', '.join(_CASES)}")
        name, file_format = _CASES[case]
        kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["kwargs"].items()}
        if models.same_layers(name, "deit"):
            distilled = bool(kwargs.get("distilled", True))
            config = models.model_config(
                name,
                **{ours: kwargs[theirs] for theirs, ours in _DEIT.items()},
                mlp_dim=_MLP_RATIO * kwargs["embed_dim"],
                norm_epsilon=timm.DEIT_NORM_EPSILON,
                distillation_token=distilled,
                distillation_head=distilled,
            )
            return Subject(config, FORMATS[file_format], _two_heads if distilled else _distillation)
        config = models.model_config(
            name,
            **{ours: kwargs[theirs] for theirs, ours in _SWIN.items()},
            mlp_ratio=_MLP_RATIO,
            norm_epsilon=timm.SWIN_NORM_EPSILON,
        )
        return Subject(config, FORMATS[file_format], _distillation)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the golden file's meta has no or an unknown {error}") from error
