"""Evaluation of a model on a data set, packed or of any other format."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from bvit_jax import data
from bvit_jax.inference.classifier import Classifier, load
from bvit_jax.runtime.mesh import make_mesh
from bvit_jax.training import evaluation
from bvit_jax.weights.class_names import Matching, matched
from bvit_jax.weights.packed import Packed


def evaluate_model(path: Path, config: ConfigDict, classes: Matching = "same") -> dict[str, Any]:
    """Evaluates whatever `bvit_jax.load` reads; see `bvit_jax.training.evaluation.evaluate_loaded`.

    Raises:
      UserError: see there; or the model cannot be read.
    """
    classifier = load(path)
    model = classifier.pretrained
    network = classifier.model if isinstance(model, Packed) else None
    return evaluation.evaluate_loaded(model, path, config, classes, network)


class Comparison(NamedTuple):
    """Two models on one split.

    Attributes:
      images: those of the split that can be decoded.
      top1: shares of them that each model classifies rightly.
      changed: to how many of them the models give different classes.
    """

    images: int
    top1: tuple[float, float]
    changed: int


def compare(first: Packed, second: Packed, path: Path, config: ConfigDict) -> Comparison:
    """Compares two packed models with the same preprocessing and classes on an evaluation split.

    Args:
      first, second: the models.
      path: for messages.
      config: its ``data`` names the data set, and its ``eval_batch_size`` is used.

    Raises:
      UserError: the models squeeze their images, or the data set has other classes.
    """
    config = evaluation.config_for(first, path, config)
    numbers = matched(data.open_eval_split(config.data).class_names, first.class_names)
    classifiers = [Classifier(model) for model in (first, second)]
    right, changed, images = np.zeros(2, int), 0, 0
    for batch in evaluation.eval_batches(config, make_mesh()):
        mask = batch["mask"]
        found = [np.asarray(c.probabilities(batch["image"])).argmax(1)[mask] for c in classifiers]
        right += [int((guess == np.array(numbers)[batch["label"][mask]]).sum()) for guess in found]
        changed, images = changed + int((found[0] != found[1]).sum()), images + int(mask.sum())
    shares = right / max(images, 1)
    return Comparison(images, (float(shares[0]), float(shares[1])), changed)
