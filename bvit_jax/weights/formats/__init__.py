"""The file formats: how each names arrays, recognises its files and describes a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bvit_jax.weights.formats import bivit, huggingface, reference, timm
from bvit_jax.weights.formats.base import Preprocessing, RawCheckpoint, Understood, deit_preprocessing
from bvit_jax.weights.names import Naming

__all__ = [
    "FORMATS",
    "Format",
    "Preprocessing",
    "RawCheckpoint",
    "Understood",
    "deit_preprocessing",
]


Constants = Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Format:
    """One family of PyTorch files.

    Attributes:
      models: names of our models that it can hold.
      check: raises `UserError` if it cannot hold the model of a configuration after all.
      naming: from a model's configuration to the names of its arrays.
      recognise: whether files are of this format.
      understand: from files to a model.
      describe: from (configuration, class names, preprocessing) to the ``config.json``.
      constants: from a configuration and the names of a state dict to the arrays that say nothing about
        the function, with the values they must have; counters and what the naming calls unused may have any.
      writes_constants: whether PyTorch's modules hold them today, so that a new file needs them.
    """

    models: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], None]
    naming: Callable[[Mapping[str, Any]], Naming]
    recognise: Callable[[RawCheckpoint], bool]
    understand: Callable[[RawCheckpoint], Understood]
    describe: Callable[[Mapping[str, Any], tuple[str, ...], Preprocessing], dict[str, Any]]
    constants: Constants
    writes_constants: bool


# In the order in which they are tried: a directory of Hugging Face's ViT before the bare names, which
# the reference shares, and Bi-ViT's before those of its backbones.
FORMATS: dict[str, Format] = {
    huggingface.NAME: Format(
        huggingface.MODELS,
        huggingface.check,
        huggingface.naming,
        huggingface.recognise,
        huggingface.understand,
        lambda config, names, _: huggingface.describe(config, names),
        huggingface.constants,
        writes_constants=False,
    ),
    reference.NAME: Format(
        reference.MODELS,
        reference.check,
        reference.naming,
        reference.recognise,
        reference.understand,
        lambda config, names, _: reference.describe(config, names),
        reference.constants,
        writes_constants=True,
    ),
    bivit.NAME: Format(
        bivit.MODELS,
        bivit.check,
        bivit.naming,
        bivit.recognise,
        bivit.understand,
        bivit.describe,
        bivit.constants,
        writes_constants=True,
    ),
    timm.NAME: Format(
        timm.MODELS,
        timm.check,
        timm.naming,
        timm.recognise,
        timm.understand,
        timm.describe,
        timm.constants,
        writes_constants=False,
    ),
    timm.MICROSOFT: Format(
        timm.MICROSOFT_MODELS,
        timm.check,
        timm.microsoft_naming,
        timm.recognise_microsoft,
        timm.understand,
        timm.describe,
        timm.microsoft_constants,
        writes_constants=True,
    ),
}
