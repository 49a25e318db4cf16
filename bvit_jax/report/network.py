"""A report on a trained network: PNG files, and a page that shows and explains them.

`network_figures` computes what `network_pictures` draws; `network_page` makes the page, which also says what
a model does not have.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from bvit_jax import files
from bvit_jax.data.progress import ProgressBar
from bvit_jax.errors import UserError
from bvit_jax.inference.images import model_input, prepared
from bvit_jax.models import same_layers
from bvit_jax.report import network_figures as figures
from bvit_jax.report import network_pictures as draw
from bvit_jax.report.curves import new_figure
from bvit_jax.report.network_figures import Block, LatentWeights, Seen
from bvit_jax.report.network_page import Picture, index_html
from bvit_jax.weights.naming import path_name
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.workdir import runs
from bvit_jax.workdir.logged import Lines, read_metrics

DPI = 100


@dataclass(frozen=True)
class Sample:
    """An input image: its name, and its pixels, uint8 (size, size, 3)."""

    name: str
    pixels: np.ndarray


def save_report(
    model: Pretrained, samples: Sequence[Sample], directory: Path, *, origin: str, lines: Lines | None = None
) -> Path:
    """Writes the report of a model into a directory, replacing an earlier one.

    Args:
      model: any of `bvit_jax.models.factory.MODELS`, with its weights.
      samples: at least one; attention is drawn on the first.
      directory: for the PNG files and ``index.html``; created if missing.
      origin: where the model comes from, for the page.
      lines: metrics of its training run, if there is one.

    Returns:
      The path of the page.

    Raises:
      UserError: weights are not finite, matplotlib is not installed, or a file cannot be written.
    """
    _check_finite(model, origin)
    with ProgressBar("running the model", 1) as bar:
        seen = figures.look(model, np.stack([sample.pixels for sample in samples]))
        bar.advance()
    pictures = describe(model, samples, seen, lines)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with ProgressBar("pictures", len(pictures)) as bar:
            for picture in pictures:
                if picture.draw is not None:
                    with files.replacing(directory / f"{picture.name}.png") as temporary:
                        picture.draw().savefig(temporary, dpi=DPI)
                bar.advance()
        page = directory / "index.html"
        files.replace_file(page, index_html(model, pictures, origin).encode(errors="replace"))
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; choose another --output") from error
    return page


def _check_finite(model: Pretrained, origin: str) -> None:
    for path, array in jax.tree_util.tree_leaves_with_path(model.variables):
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise UserError(
                f"the weights of {origin} are not finite, first {path_name(path)}; choose a checkpoint from"
                " before the run diverged"
            )


# --- the sections of the page ------------------------------------------------------------------


def describe(model: Pretrained, samples: Sequence[Sample], seen: Seen, lines: Lines | None) -> list[Picture]:
    """Returns the sections of the page, drawn or not."""
    params, blocks = model.arrays()["params"], figures.blocks_of(model.config)
    weights = figures.latent_weights(model)
    return [
        _describe_samples(model, samples, seen),
        _describe_filters(model, params, samples),
        *_describe_weights(model, weights),
        _describe_flips(weights, lines),
        _describe_balance(model, seen, len(samples)),
        _describe_attention(samples[0], blocks, seen),
        _describe_branches(params, blocks),
        _describe_positions(model, params, blocks),
    ]


def _describe_samples(model: Pretrained, samples: Sequence[Sample], seen: Seen) -> Picture:
    titles = [
        f"{sample.name}\n→ {model.class_names[int(np.argmax(row))]}, {100 * row.max():.1f} %"
        for sample, row in zip(samples, seen.probabilities, strict=True)
    ]
    return Picture(
        "Images",
        "The inputs, preprocessed as the checkpoint says, and after the arrow the likeliest class"
        " with its probability.",
        "images",
        lambda: draw.samples([sample.pixels for sample in samples], titles),
    )


def _describe_filters(model: Pretrained, params: Any, samples: Sequence[Sample]) -> Picture:
    grey = all((sample.pixels == sample.pixels[..., :1]).all() for sample in samples)
    grey = grey and len(set(model.preprocessing.std)) == 1
    text = (
        "The kernels of the patch embedding as colours, from smooth to fine: sorted by the mean spatial"
        " frequency of their energy. Mid-grey is 0. All filters have the same scale, so that weak ones are"
        " grey; full brightness is the 99.5th percentile of the magnitudes."
    )
    if grey:
        text += (
            " On grey images, such as these, only the mean of a filter's colours matters, so that training"
            " shapes nothing else: it is drawn next to them and sorts both."
        )
    kernel = params["embedding"]["patches"]["kernel"]
    return Picture("First-layer filters", text, "filters", lambda: draw.filters(kernel, grey))


def _describe_weights(model: Pretrained, weights: Sequence[LatentWeights]) -> list[Picture]:
    if not weights:
        bits = model.config.get("weight_bits", 32)
        reason = f"the weights of this model have {bits} bits; only those of one bit are signs of others."
        return [Picture("Latent weights", reason)]
    release = model.config.name == "bivit_release_swin"
    return [
        Picture(
            "Latent weights",
            "Histograms of what each layer takes the sign of: its weights, in linear layers of BinaryViT"
            " and in all layers of BHViT minus the mean of their output channel. The shaded range is [-1, 1],"
            " outside which a weight has no gradient; the percentage is the share inside. Where no edge is"
            " visible, it lies outside the frame. All frames have the same width; the first and last bars"
            " count what lies outside."
            + " Patch merging, where each output has a window of its own, is not here."
            * release,
            "weights",
            lambda: draw.histograms(weights),
        ),
        Picture(
            "How far latent weights are from the edge of the window",
            "Magnitudes of the same weights: the line spans the 1st to the 99th percentile, the thick part"
            " the middle half, the dot is the median and the cross the largest. Beyond 1, the red line, there"
            " is no gradient; near 0 a small step flips the sign. On the right the share inside.",
            "weight_magnitudes",
            lambda: draw.magnitudes(weights),
        ),
    ]


def _describe_flips(weights: Sequence[LatentWeights], lines: Lines | None) -> Picture:
    title = "Sign flips over training"
    if not weights:
        return Picture(title, "this model has no weights of one bit.")
    if lines is None:
        return Picture(title, "they are in the metrics of a training run: pass its workdir.")
    steps, layers, rates = figures.flip_rates(lines)
    if not np.isfinite(rates).any():
        reason = (
            "the metrics of the run do not have them: config.health is off, its first epoch has not ended,"
            " or metrics.jsonl cannot be read."
        )
        return Picture(title, reason)
    return Picture(
        title,
        "Share of each layer's signs that differ from those at the previous log, log_every_steps"
        " steps earlier. Top: the mean over the layers, and the range from the smallest to the"
        " largest. Grey: no sign flipped, or no value.",
        "flips",
        lambda: draw.flips(steps, layers, rates),
    )


def _describe_balance(model: Pretrained, seen: Seen, count: int) -> Picture:
    title = "Sign balance of activations"
    if not seen.balance:
        return Picture(title, "this model takes no signs of activations.")
    images = "one image" if count == 1 else f"{count} images"
    heads = " (in attention, of the heads)" * model.config.name.startswith("bivit_release")
    return Picture(
        title,
        f"Share of +1 among the signs that each product sees, over all tokens of {images}. The dot is the"
        f" mean, the line spans the 5th to the 95th percentile of the channels{heads}. On the right the share"
        " of channels whose sign is always the same here, so that they distinguish no tokens. A sign that"
        " is 0 does not count as +1.",
        "balance",
        lambda: draw.balance(seen.balance),
    )


def _describe_attention(sample: Sample, blocks: Sequence[Block], seen: Seen) -> Picture:
    binary = not all(np.array_equal(a, b) for a, b in zip(seen.softmax, seen.used, strict=True))
    if binary:
        forms = "as the softmax returns it, and binarised, as the product with the values uses it"
    else:
        forms = "as the softmax returns it, which this model does not binarise"
    first = figures.attending(blocks)[0]
    apart = ", without class and distillation tokens" * bool(first.extra_tokens)
    windows = " There is none outside a token's window." * (first.window is not None)
    if first is not blocks[0]:
        windows = (
            " Blocks without attention are not here. Outside a token's window there is only that to merged"
            " tokens, spread over the squares that they stand for; the sum is next to the maps."
        )
    return Picture(
        "Attention",
        f"Where tokens attend in {sample.name}, in the first and the last block of each stage: {forms}. Maps"
        f" are means over the heads{apart}. The square marks the central token, the query. Each map has its"
        f" own scale.{windows}"
        + " Below each block: the share of the binarised attention that is not 0."
        * binary,
        "attention",
        lambda: draw.attention(sample.pixels, blocks, seen, binary),
    )


def _describe_branches(params: Any, blocks: Sequence[Block]) -> Picture:
    title = "Weights of the pooling branches"
    scales = figures.branch_scales(params, blocks)
    if any(name.startswith("shift_") for name in scales):
        names = "shift_h3 averages three rows, shift_ch5 moves quarters of the channels by two tokens"
        title = "Weights of the shift branches"
    elif any(name.startswith("pool_") for name in scales):
        names = "pool_h3 averages three rows, pool_w5 five columns"
    else:
        return Picture(title, "this model has no pooling branches.")
    return Picture(
        title,
        "The LayerScale factors of each block's branches, one per channel. Top: their mean"
        f" magnitude: {names}; attention_scale and mlp_scale scale"
        " the main branches, where the model has them. Bottom: the median of each of the other branches, and"
        " the range from the 5th to the 95th percentile. They start at 0, the main ones at 0.1.",
        "branches",
        lambda: draw.branches(scales),
    )


def _describe_positions(model: Pretrained, params: Any, blocks: Sequence[Block]) -> Picture:
    if same_layers(model.config.name, "swin"):
        return Picture(
            "Relative position biases",
            "This model has no position embeddings. This is what it adds to the score of a key, by its"
            " position relative to the query, which is in the middle: in the first and the last block of each"
            f" stage, the first {draw.MAX_TILES} heads at most.",
            "positions",
            lambda: draw.biases(params, blocks),
        )
    embeddings = figures.position_embeddings(params, model.config)
    return Picture(
        "Position embeddings",
        "Cosine similarity of the embedding of one position with all. Each tile is the whole grid of a"
        " stage, compared with one position, and lies where that position is in the image.",
        "positions",
        lambda: draw.positions(embeddings),
    )


# --- the command -------------------------------------------------------------------------------


def default_samples(model: Pretrained) -> list[Sample]:
    """Returns images that need no download: one of each digit for a model of digits, else a portrait.

    The digits are held-out ones from scikit-learn; the portrait of Grace Hopper comes with matplotlib.
    """
    if model.class_names == tuple(map(str, range(10))):
        return _digits(model)
    from matplotlib import cbook

    path = Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    return [Sample("matplotlib's portrait of Grace Hopper", model_input(path, model.preprocessing))]


def _digits(model: Pretrained) -> list[Sample]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    samples = []
    for digit in range(10):
        held_out = next(i for i in range(0, len(bunch.target), 5) if bunch.target[i] == digit)
        pixels = np.round(bunch.images[held_out] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels).convert("RGB")
        samples.append(Sample(f"digit {digit}", prepared(image, model.preprocessing)))
    return samples


def run(arguments: argparse.Namespace) -> None:
    """Runs the command ``network``."""
    new_figure()  # before the work, where matplotlib is missing
    paths = arguments.image or []
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"--image: no file {missing[0]}; expected an image")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"--output: {arguments.output} is a file; name a directory")
    checkpoint = arguments.checkpoint
    model = runs.load_model(checkpoint, kind=arguments.kind, ema=arguments.ema)
    samples = [Sample(path.name, model_input(path, model.preprocessing)) for path in paths]
    lines = _metrics(checkpoint) if runs.is_run(checkpoint) else None
    page = save_report(
        model, samples or default_samples(model), arguments.output, origin=str(checkpoint), lines=lines
    )
    sys.stdout.write(f"{page}\n")


def _metrics(workdir: Path) -> Lines:
    """Returns what a run has logged; only the flips depend on it, so that its loss is no error."""
    try:
        return read_metrics(workdir)
    except UserError as error:
        sys.stderr.write(f"flips are not drawn: {error}\n")
        return []
