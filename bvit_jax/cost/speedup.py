"""By what factor a binary model needs fewer operations than its real-valued backbone, by what is counted.

Published speed-ups depend on which layers are in the count, and on rounding. Bi-ViT's 61.5 (DeiT-Ti) is no
quotient of exact counts; it is that of both counts rounded to 0.01 G without the patch embedding: 1.23 G
over 0.02 G. Its 56.1 (Swin-T) is 4.49 G over 0.08 G, with the patch embedding and without the head.
"""

from dataclasses import dataclass

from bvit_jax.cost.count import LayerCost, ModelCost, add_up

EMBEDDING = "embedding"  # names of modules, the same in every model here
HEADS = ("head", "distillation_head")
CONVENTIONS: dict[str, tuple[str, ...]] = {  # what is left out
    "everything": (),
    "without the patch embedding": (EMBEDDING,),
    "without the heads": HEADS,
    "without patch embedding and heads": (EMBEDDING, *HEADS),
}
PRECISION = 1e7  # of published counts: 0.01 G


@dataclass(frozen=True)
class Speedup:
    """A comparison under one convention.

    Attributes:
      convention: a key of `CONVENTIONS`.
      macs: multiply-accumulates of the real-valued backbone.
      ops: operations of the binary model, binary multiply-accumulates over 64 plus real ones.
      ratio: the first over the second.
      rounded_ratio: the same of both rounded to 0.01 G; None where the second rounds to nothing.
    """

    convention: str
    macs: int
    ops: float
    ratio: float
    rounded_ratio: float | None


def speedups(model: ModelCost, backbone: ModelCost) -> tuple[Speedup, ...]:
    """Compares a model with its backbone under each of `CONVENTIONS`."""
    return tuple(
        _speedup(name, _without(model, left_out), _without(backbone, left_out))
        for name, left_out in CONVENTIONS.items()
    )


def _without(cost: ModelCost, names: tuple[str, ...]) -> LayerCost:
    return add_up((layer for layer in cost.layers if layer.path.split("/")[0] not in names), "", "")


def _speedup(name: str, model: LayerCost, backbone: LayerCost) -> Speedup:
    macs = sum(backbone.macs.values())
    rounded = round(model.ops / PRECISION)
    return Speedup(
        name, macs, model.ops, macs / model.ops, round(macs / PRECISION) / rounded if rounded else None
    )
