"""Element-wise representational capability: how many values an element before the classifier can take.

This is the measure of section 3 of the supplement of BinaryViT (CVPRW 2023). We know three of its numbers,
not its text: R(ResNet-34) = 71,193,472; R(DeiT-S), printed as 153,216; and 155,568, to which its
printed formula evaluates, the difference being a term of 196 for the attention of each of the 12 blocks.
The rules below are **reconstructed** from those numbers, which they reproduce exactly:

1. A real product of k inputs from an image has ``floor(255 k / 2)`` values.
2. A binary product with fan-in k and a shortcut around it adds k. In attention, the sum over the keys is
   such a product, with as many inputs as there are keys.
3. An average over n elements, and so a pool in a shortcut, multiplies by n; repeating elements does not.
4. What a shortcut carries into a block is counted once: shortcuts inside it, from the same tokens, add
   nothing. A product without a shortcut around it, such as the first convolution of a block of ResNet-34,
   adds nothing either.
5. Normalisation, RPReLU, scales and shifts per channel change no number of values.

By rule 2, in a block of width C with feed-forward width M: query, key, value and output add C each, the
attention the number of its keys, the first product of the feed-forward C, M/C times over by rule 3 because
the shortcut of the second averages as many channels, and the second M. That is 4 C + keys + 2 M.

What the three numbers leave open is decided here and stated where it is used: pooling branches parallel to a
block, the product that reduces keys and values, and LayerScale have no term. In BHViT the three convolutions
of a token mixer are one product with the fan-in of all three, three masks of attention are three products,
and shift branches and merged tokens have no term.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bvit_jax.errors import UserError

FAMILIES = ("bhvit", "binaryvit", "react_deit")
LEVELS = 255  # of a pixel above 0

PUBLISHED_RESNET34 = 71_193_472
PUBLISHED_DEIT_S = 155_568  # the formula
PRINTED_DEIT_S = 153_216  # without the terms of attention

_OPEN = (
    "pooling branches next to the blocks: no term, the published numbers have none",
    "LayerScale: no term, by rule 5",
)


@dataclass(frozen=True)
class Line:
    """One step of a derivation.

    Attributes:
      layer: what is applied.
      formula: with the numbers in place of the letters.
      factor, added: the capability is multiplied by the first, then the second is added.
      capability: after the step.
    """

    layer: str
    formula: str
    factor: int
    added: int
    capability: int


@dataclass(frozen=True)
class Derivation:
    """The capability of one network.

    Attributes:
      name: of the network.
      lines: from the image to the classifier.
      notes: caveats of the result.
    """

    name: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def capability(self) -> int:
        """The result."""
        return self.lines[-1].capability


Step = tuple[str, str, int, int]  # of a `Line`, without its capability


def _derive(name: str, steps: Sequence[Step], notes: Sequence[str] = ()) -> Derivation:
    lines, capability = [], 0
    for layer, formula, factor, added in steps:
        capability = factor * capability + added
        lines.append(Line(layer, formula, factor, added, capability))
    return Derivation(name, tuple(lines), tuple(notes))


def _embedding(inputs: Sequence[int], layer: str) -> Step:
    fan_in = 1
    for size in inputs:
        fan_in *= size
    shown = "·".join(map(str, inputs))
    return layer, f"floor({LEVELS} · {shown} / 2)", 1, LEVELS * fan_in // 2


def _block(layer: str, width: int, mlp_dim: int, keys: int, masks: int = 1) -> Step:
    attended = f"{masks}·{keys}" if masks > 1 else f"{keys}"
    formula = f"4·{width} + {attended} + {mlp_dim // width}·{width} + {mlp_dim}"
    return layer, formula, 1, 4 * width + masks * keys + 2 * mlp_dim


def _downsampling(stage: int, narrower: int) -> Step:
    return f"stage {stage}: 2×2 product, 2×2 average", f"· 4, + 4·{narrower}", 4, 4 * narrower


def _average(elements: int, layer: str = "average of all tokens") -> Step:
    return layer, f"· {elements}", elements, 0


# --- the networks of the supplement ------------------------------------------------------------


def resnet34() -> Derivation:
    """Returns the derivation of the binary ResNet-34 with a shortcut for two convolutions."""
    steps: list[Step] = [_embedding((7, 7, 3), "first convolution, real, 7×7")]
    widths, blocks = (64, 128, 256, 512), (3, 4, 6, 3)
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), 1):
        if stage > 1:
            steps.append((f"stage {stage}: shortcut, 2×2 average", "· 4", 4, 0))
        for block in range(1, count + 1):
            steps.append(
                (f"stage {stage}, block {block}: second 3×3 convolution", f"9·{width}", 1, 9 * width)
            )
    return _derive("ResNet-34", [*steps, _average(49, "average of 7×7")], ["published: 71,193,472"])


def deit_small() -> Derivation:
    """Returns the derivation of the supplement's DeiT-S, which reads a class token."""
    steps = [_embedding((16, 16, 3), "patch embedding, real, 16×16")]
    steps += [_block(f"block {i}", 384, 1536, 196) for i in range(1, 13)]
    notes = [
        "published: printed as 153,216; the printed formula evaluates to 155,568",
        "the printed number leaves out the attention's 196 of each of the 12 blocks:"
        f" {PUBLISHED_DEIT_S:,} - 12·196 = {PUBLISHED_DEIT_S - 12 * 196:,}",
        "the formula has 196 keys, the patches; the class token, which is a key too, is not in it",
    ]
    return _derive("DeiT-S", steps, notes)


# --- the models here ---------------------------------------------------------------------------


def capability_of(settings: Mapping[str, Any], name: str = "") -> Derivation:
    """Returns the derivation of a model's capability.

    Args:
      settings: of the model, complete, as `bvit_jax.models.model_config` returns them.
      name: to call it by.

    Raises:
      UserError: the rules say nothing about such a model.
    """
    model = settings["name"]
    if model not in FAMILIES:
        raise UserError(
            f"config.model.name is {model!r}: the rules of representational capability are known for"
            f" {', '.join(FAMILIES)} only; choose one of them"
        )
    for key in ("weight_bits", "act_bits"):
        if settings[key] != 1:
            raise UserError(
                f"config.model.{key} is {settings[key]}: the rules of representational capability are those"
                " of products of one bit; set it to 1"
            )
    if model == "react_deit":
        return _react_deit(settings, name or model)
    if settings["some_fp"]:
        raise UserError(
            "config.model.some_fp is True: the rules of representational capability say nothing about a real"
            " product of features, which the patch embeddings between the stages are; set it to False"
        )
    return (_bhvit if model == "bhvit" else _binaryvit)(settings, name or model)


def _react_deit(s: Mapping[str, Any], name: str) -> Derivation:
    patch = s["patch_size"]
    patches = (s["image_size"] // patch) ** 2
    steps = [_embedding((patch, patch, 3), f"patch embedding, real, {patch}×{patch}")]
    steps += [_block(f"block {i}", s["width"], s["mlp_dim"], patches) for i in range(1, s["depth"] + 1)]
    notes = [note for note, used in zip(_OPEN, (s["pool_branches"], s["layer_scale"])) if used]
    if s["class_token"]:
        notes.append("keys are the patches, as in the supplement's DeiT-S; the class token is not counted")
    else:
        steps.append(_average(patches))
    return _derive(name, steps, notes)


def _binaryvit(s: Mapping[str, Any], name: str) -> Derivation:
    patch = s["patch_size"]
    side = s["image_size"] // patch
    steps = [_embedding((patch, patch, 3), f"patch embedding, real, {patch}×{patch}")]
    reduced = factors = 0  # what the products that reduce keys and values would add
    stages = zip(s["width"], s["depth"], s["mlp_dim"], s["reduction"], strict=True)
    for stage, (width, depth, mlp_dim, reduction) in enumerate(stages, 1):
        if stage > 1:
            side //= 2
            steps.append(_downsampling(stage, s["width"][stage - 2]))
            reduced *= 4
        keys = (side // reduction) ** 2
        steps += [_block(f"stage {stage}, block {i}", width, mlp_dim, keys) for i in range(1, depth + 1)]
        if reduction > 1:
            reduced += 2 * width * depth
            factors += depth
    steps.append(_average(side**2))
    notes = [note for note, used in zip(_OPEN, (s["pool_branches"], s["layer_scale"])) if used]
    if factors:
        notes.append(
            "products that reduce keys and values: no term, the published numbers have none; counted in key"
            f" and value each they would add {reduced * side**2:,}"
        )
    return _derive(name, steps, [*notes, "not published"])


def _bhvit(s: Mapping[str, Any], name: str) -> Derivation:
    patch, side, width = s["patch_size"], s["image_size"] // s["patch_size"], s["width"]
    steps = [_embedding((patch, patch, 3), f"patch embedding, real, {patch}×{patch}")]
    for stage, (depth, mlp_dim) in enumerate(zip(s["depth"], s["mlp_dim"], strict=True), 1):
        if stage > 1:
            steps.append(_downsampling(stage, width))
            side, width = side // 2, 2 * width
        keys = s["window_size"] ** 2 + (side // s["window_size"]) ** 2  # of the window, and merged
        block = _mixer_block if stage < 3 else partial(_block, keys=keys, masks=3)
        steps += [block(f"stage {stage}, block {i}", width, mlp_dim) for i in range(1, depth + 1)]
    steps.append(_average(side**2))
    notes = [
        "token mixers: one product with the 3·9 inputs of its three convolutions, in four groups of channels",
        "attention: three products, one for each mask",
        "merged tokens: no term beyond that of their keys, averages next to the blocks have none",
    ]
    if s["shift_branches"]:
        notes.append("shift branches: no term, as pooling branches have none")
    return _derive(name, steps, [*notes, *_OPEN[1:] * s["layer_scale"], "not published"])


def _mixer_block(layer: str, width: int, mlp_dim: int) -> Step:
    formula = f"27·{width // 4} + {mlp_dim // width}·{width} + {mlp_dim}"
    return layer, formula, 1, 27 * width // 4 + 2 * mlp_dim
