"""The table of models in README.md: what each costs, what was published, and what is verified here."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.cost import cost_of
from bvit_jax.data.progress import ProgressBar
from bvit_jax.inference.engine.families import FAMILIES
from bvit_jax.inference.packing import export
from bvit_jax.report.text import markdown
from bvit_jax.runtime.arguments import parse_config
from bvit_jax.weights import Preprocessing, Pretrained
from bvit_jax.weights.class_names import default_class_names
from bvit_jax.weights.state_dicts import abstract_variables

BEGIN, END = "<!-- models: python -m bvit_jax.report table -->", "<!-- end of models -->"
HEAD = ("model", "parameters", "packed", "OPs", "published top-1", "configuration", "verified here")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      title: the name of the model in words.
      config: its file in ``configs/``, with an argument if needed; "" if it has none.
      published: top-1 on ImageNet and its source.
      verified: what this project has checked.
      model: its name and the settings that differ from the defaults; by default those of the file.
    """

    title: str
    config: str
    published: str
    verified: str
    model: tuple[str, dict[str, Any]] = ("", {})


NONE = "-"
_OWN = "our own formulation, checked against slow code; not trained: docs/bivit.md"
_BHVIT = "float64 parity: first batch, gradients, AdamW steps"
_DISTILLED = {"distillation_token": True, "distillation_head": True}
ROWS = (
    Row(
        "BinaryViT",
        "binaryvit_small.py",
        "67.7 (as later papers quote it)",
        "float64 parity, at full size too: logits 1e-15, all 1,361 gradients 2e-12; with AdamW steps; W1A32"
        " and W4A1",
    ),
    Row("BinaryViT, real patch embeddings", "binaryvit_small.py:some_fp", NONE, "float64 parity"),
    Row("BHViT-S", "bhvit.py", "68.4 (BHViT)", _BHVIT),
    Row("BHViT-S, real patch embeddings", "bhvit.py:fp_downsample", "70.1 (BHViT)", _BHVIT),
    Row("BHViT-T", "bhvit.py:tiny", "64.0 (BHViT)", _BHVIT),
    Row("BHViT-T, real patch embeddings", "bhvit.py:tiny,fp_downsample", "66.0 (BHViT)", _BHVIT),
    Row("ReActNet-DeiT-S", "react_deit_small.py:cls", NONE, "float64 parity"),
    Row("+ average pooling", "react_deit_small.py:avg_pool", NONE, "float64 parity"),
    Row(
        "+ pooling branches",
        "react_deit_small.py:multi_branch",
        NONE,
        "float64 parity, with LayerScale, at full width",
    ),
    Row("+ LayerScale", "react_deit_small.py:ls", NONE, "float64 parity, with AdamW steps"),
    Row("DeiT-S, real", "deit_small.py", "79.9 (DeiT)", "float64 parity; transformers' ViT, float64"),
    Row(
        "DeiT-S with distillation",
        "",
        "81.2 (DeiT)",
        "float64 parity; transformers' DeiT, one head and two",
        ("deit", _DISTILLED),
    ),
    Row("Swin-T, real", "", "81.3 (Swin)", "float64 parity; transformers' Swin", ("swin", {})),
    Row("Bi-ViT, DeiT-Ti", "bivit_deit.py", "28.7 (Bi-ViT)", _OWN),
    Row("Bi-ViT, DeiT-S", "bivit_deit.py:small", "40.9 (Bi-ViT)", _OWN),
    Row("Bi-ViT, Swin-T", "bivit_swin.py", "55.5 (Bi-ViT)", _OWN),
    Row(
        "Bi-ViT as released, DeiT-S",
        "",
        NONE,
        "float64 parity: first batch and gradients; DeiT-Ti at full size too",
        ("bivit_release_deit", {}),
    ),
    Row(
        "Bi-ViT as released, Swin-T",
        "",
        NONE,
        "float64 parity, at full size too",
        ("bivit_release_swin", {}),
    ),
    Row("BinaryViT for digits", "digits.py", NONE, "trained here: 96.7 to 98.3 % of the held-out digits"),
    Row("Bi-ViT for digits", "bivit_digits.py", NONE, "trained here: 93.9 % of the held-out digits"),
    Row("BHViT for digits", "bhvit_digits.py", NONE, "trained here: 97.8 to 98.9 % of the held-out digits"),
    Row("DeiT for digits", "deit_digits.py", NONE, "trained here: 97.5 to 97.8 % of the held-out digits"),
)


def as_markdown() -> str:
    """Returns the table with the marks that enclose it in README.md.

    Raises:
      UserError: an experiment is missing.
    """
    rows = []
    with ProgressBar("models", len(ROWS)) as bar:
        for row in ROWS:
            rows.append(_cells(row))
            bar.advance()
    return f"{BEGIN}\n{markdown(HEAD, rows)}\n{END}"


def _cells(row: Row) -> tuple[str, ...]:
    settings = _settings(row)
    scanned = models.Execution(scan_blocks=True)  # costs the same, and is traced once a stage
    total = cost_of(
        models.create_model(settings, execution=scanned), settings.image_size, training=False
    ).total
    name, given = row.model
    arguments = ", ".join([f'"{name}"', *(f"{key}={value}" for key, value in given.items())])
    return (
        row.title,
        f"{total.params:,}",
        f"{_file_bytes(settings, total.packed_bytes) / 1e6:.2f} MB",
        f"{total.ops / 1e9:.4f} G",
        row.published,
        f"`{row.config}`" if row.config else f"`model_config({arguments})`",
        row.verified,
    )


def _file_bytes(settings: ConfigDict, real: int) -> int:
    """Returns the size of the packed file of a model of one bit; that of others is ``real``."""
    if settings.name not in FAMILIES:
        return real
    shapes = abstract_variables(models.create_model(settings), settings.image_size)
    # No weight is at the mean of its row, as after training: a zero would take a plane of words.
    values = np.random.default_rng(0).uniform(0.1, 1, 4096).astype(np.float32)
    variables = jax.tree.map(lambda leaf: np.resize(values, leaf.shape), shapes)
    size, names = settings.image_size, default_class_names(settings.num_classes)
    model = Pretrained(settings, variables, Preprocessing(size, size), names)
    with tempfile.TemporaryDirectory() as directory:
        export(model, Path(directory, "packed"))
        return sum(file.stat().st_size for file in Path(directory, "packed").iterdir())


def _settings(row: Row) -> ConfigDict:
    if not row.model[0]:
        return parse_config([f"--config={row.config.replace('.py', '')}"]).model
    name, settings = row.model
    return models.model_config(name, **settings)
