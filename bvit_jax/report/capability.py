"""The report on representational capability: every step of its derivation."""

from typing import Any

from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.cost import capability
from bvit_jax.cost.capability import Derivation
from bvit_jax.report.text import table

ABLATION: dict[str, dict[str, Any]] = {  # the rows of configs/react_deit_small.py
    "ReActNet-DeiT-S": {"class_token": True, "pool_branches": (), "layer_scale": False},
    "+ average pooling": {"pool_branches": (), "layer_scale": False},
    "+ pooling branches": {"layer_scale": False},
    "+ LayerScale": {},
}


def all_derivations() -> list[Derivation]:
    """Returns the derivations of the paper's supplement, of its ablation, of BHViT and of BinaryViT."""
    rows = [
        capability.capability_of(models.model_config("react_deit", **settings), name)
        for name, settings in ABLATION.items()
    ]
    rows += [
        capability.capability_of(models.model_config(name), title)
        for name, title in (("bhvit", "BHViT-S"), ("binaryvit", "BinaryViT"))
    ]
    return [capability.resnet34(), capability.deit_small(), *rows]


def derivation_of(config: ConfigDict) -> Derivation:
    """Returns the derivation for the model of an experiment.

    Raises:
      UserError: the rules do not cover that model.
    """
    models.create_model(config.model)  # for its checks
    return capability.capability_of(config.model)


def figures(derivations: list[Derivation]) -> list[dict[str, Any]]:
    """Returns derivations as values of JSON."""
    return [
        {
            "network": item.name,
            "capability": item.capability,
            "lines": [vars(line) for line in item.lines],
            "notes": list(item.notes),
        }
        for item in derivations
    ]


def as_text(derivations: list[Derivation]) -> str:
    """Returns derivations as text, with a summary where there are several."""
    parts = [one_as_text(item) for item in derivations]
    if len(parts) > 1:
        parts.append(summary(derivations))
    parts.append(
        "The rules are reconstructed from the three published numbers: see bvit_jax/cost/capability.py and"
        " docs/cost.md."
    )
    return "\n\n".join(parts) + "\n"


def summary(derivations: list[Derivation]) -> str:
    """Returns a table of the results."""
    rows = [(item.name, f"{item.capability:,}", f"{item.capability:.3g}") for item in derivations]
    return table(("network", "R", ""), rows, left=1)


def one_as_text(item: Derivation) -> str:
    """Returns a derivation line by line."""
    rows = [(f"  {x.layer}", x.formula, f"{x.capability:,}") for x in item.lines]
    lines = [f"R({item.name}) = {item.capability:,}", table(("  after", "step", "R"), rows, left=2)]
    return "\n".join([*lines, *(f"  {note}" for note in item.notes)])
