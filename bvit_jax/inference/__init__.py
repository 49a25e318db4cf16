"""Inference: a model of any origin as a classifier of images, and the command ``bvit predict``.

`Classifier` joins a network to its preprocessing and class names, and takes arrays, PIL images and files
alike. It reads runs and weights of any format, and packed files, which `engine` runs; `export` writes those.
"""

from typing import TYPE_CHECKING

from bvit_jax.imports import lazily

if TYPE_CHECKING:
    from bvit_jax.inference.classifier import Classifier, Guess, load, predict, save
    from bvit_jax.inference.packing import export

__all__ = ["Classifier", "Guess", "export", "load", "predict", "save"]

__getattr__ = lazily(__name__)
