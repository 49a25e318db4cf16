"""Drawings of what `bvit_jax.report.network_figures` computes, as matplotlib figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bvit_jax.report import network_figures as figures
from bvit_jax.report.curves import new_figure, plain, subplots
from bvit_jax.report.network_figures import Block, LatentWeights, Seen

MAX_TILES = 8  # positions along a side, or heads in a row
MAX_ROW = 5  # images in a row
ROW = 0.19  # inches per line in a list of layers
GAP = np.array([0.75, 0.86, 0.97])  # colour between tiles
INSIDE, OUTSIDE = "#1f77b4", "#d62728"


def samples(images: Sequence[np.ndarray], titles: Sequence[str]) -> Any:
    """Draws images under their titles."""
    columns = min(len(images), MAX_ROW)
    rows = -(-len(images) // columns)
    size, letters = (1.7, 20) if len(images) > 1 else (4.0, 45)
    shape = (columns * size, rows * (size + 0.5))
    figure, axes = subplots(rows, columns, figsize=shape)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles):
        axis.imshow(image)
        lines = [_wrapped(plain(line), letters) for line in title.splitlines()]
        axis.set_title("\n".join(lines), fontsize=9)
    return figure


def filters(kernel: np.ndarray, grey: bool) -> Any:
    """Draws the filters of a patch embedding, (size, size, 3, filters).

    With ``grey`` they are sorted by their response to grey images, which is drawn next to them.
    """
    mean = np.broadcast_to(kernel.mean(axis=2, keepdims=True), kernel.shape)
    order = figures.filter_order(mean if grey else kernel)
    shown = {"in colour": kernel, "mean of the colours": mean} if grey else {"in colour": kernel}
    columns = min(32, max(8, round(np.sqrt(len(order) * (1 if grey else 2)))))
    shape = (10, 10 / len(shown) * -(-len(order) // columns) / columns + 0.5)
    figure, axes = subplots(1, len(shown), figsize=shape)
    for axis, (name, kernels) in zip(axes[0], shown.items(), strict=True):
        limit = np.quantile(np.abs(kernels), 0.995) or 1.0
        tiles = np.moveaxis(kernels, -1, 0)[order]
        axis.imshow(_tiled(np.clip(0.5 + 0.5 * tiles / limit, 0, 1), columns), interpolation="nearest")
        axis.axis("off")
        axis.set_title(f"{name}; full brightness ±{limit:.3g}", fontsize=10)
    return figure


def _tiled(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Returns tiles (n, size, size, 3) in rows, separated by a colour that is neither white nor black."""
    count, size = tiles.shape[:2]
    gap = max(1, size // 8)
    rows = -(-count // columns)
    sheet = np.tile(GAP, (rows * (size + gap) - gap, columns * (size + gap) - gap, 1))
    for i, tile in enumerate(tiles):
        y, x = (k * (size + gap) for k in divmod(i, columns))
        sheet[y : y + size, x : x + size] = tile
    return sheet


def histograms(weights: Sequence[LatentWeights]) -> Any:
    """Draws a histogram of the latent weights of each layer, one row per block."""
    groups: dict[str, list[LatentWeights]] = {}
    for layer in weights:
        groups.setdefault(layer.layer.partition("/")[0], []).append(layer)
    columns = max(map(len, groups.values()))
    limit = 1.1 * max(np.quantile(np.abs(layer.values), 0.999) for layer in weights) or 1.0
    figure, axes = subplots(
        len(groups), columns, figsize=(max(1.6 * columns, 4), 1.25 * len(groups) + 0.4), sharex=True
    )
    edges = np.linspace(-limit, limit, 62)
    for row, (group, layers) in zip(axes, groups.items(), strict=True):
        row[0].set_ylabel(group.replace("_", "\n"), fontsize=9, rotation=0, ha="right", va="center")
        for axis in row[len(layers) :]:
            axis.axis("off")
        for axis, layer in zip(row, layers):
            counts, _ = np.histogram(np.clip(layer.values, -limit, limit), edges)
            axis.axvspan(max(-1, -limit), min(1, limit), color=INSIDE, alpha=0.13, linewidth=0)
            if limit > 1:
                axis.axvline(-1, color=OUTSIDE, linewidth=1)
                axis.axvline(1, color=OUTSIDE, linewidth=1)
            axis.stairs(counts / counts.max(), edges, fill=True, color=INSIDE)
            axis.set_title(f"{short_layer(layer.layer)}  {_percent(layer.inside)}", fontsize=8)
            axis.set_xlim(-limit, limit)
            axis.set_yticks([])
            axis.tick_params(labelsize=8)
    return figure


def magnitudes(weights: Sequence[LatentWeights]) -> Any:
    """Draws the percentiles of the magnitudes of each layer's latent weights."""
    figure, axis = _layer_axis([layer.layer for layer in weights])
    for y, layer in enumerate(weights):
        magnitudes = np.abs(layer.values)
        low, first, median, third, high = np.quantile(magnitudes, [0.01, 0.25, 0.5, 0.75, 0.99])
        axis.plot([low, high], [y, y], color=INSIDE, linewidth=1)
        axis.plot([first, third], [y, y], color=INSIDE, linewidth=4)
        axis.plot(median, y, "o", color="black", markersize=3)
        axis.plot(magnitudes.max(), y, "x", color="black", markersize=4)
    axis.set_xscale("log")
    axis.axvline(1, color=OUTSIDE, linewidth=1.2)
    axis.set_xlabel("magnitude of the latent weight")
    _right_column(axis, [_percent(layer.inside) for layer in weights], "inside")
    return figure


def flips(steps: Sequence[int], layers: Sequence[str], rates: np.ndarray) -> Any:
    """Draws the share of flipped signs, (layers, steps), as a heat map below its mean."""
    height = ROW * len(layers)
    figure, axes = subplots(2, 1, figsize=(10, height + 3.2), height_ratios=[1.8, height + 0.2], sharex=True)
    top, axis = axes.flat
    places = np.arange(len(steps))
    known = np.isfinite(rates).any(axis=0)
    inside = rates[:, known]
    top.fill_between(
        places[known],
        100 * np.nanmin(inside, axis=0),
        100 * np.nanmax(inside, axis=0),
        alpha=0.25,
        linewidth=0,
    )
    top.plot(places[known], 100 * np.nanmean(inside, axis=0), marker="o", markersize=3)
    top.set_ylabel("flipped (%)")
    top.grid(alpha=0.3)
    percent = np.where(rates > 0, 100 * rates, np.nan)
    from matplotlib.colors import LogNorm

    finite = percent[np.isfinite(percent)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.1, 1.0)
    axis.set_facecolor("0.85")
    image = axis.imshow(
        percent,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(low, max(high, 1.01 * low)),
    )
    axis.set_yticks(range(len(layers)), [long_layer(layer) for layer in layers], fontsize=8)
    shown = range(0, len(steps), -(-len(steps) // 12))
    axis.set_xticks(shown, [str(steps[i]) for i in shown])
    axis.set_xlabel("step")
    figure.colorbar(image, ax=axis, label="flipped (%)", aspect=30, pad=0.01)
    return figure


def balance(balance: dict[str, np.ndarray]) -> Any:
    """Draws the mean and the spread of the share of +1 in each layer."""
    figure, axis = _layer_axis(list(balance))
    for y, shares in enumerate(balance.values()):
        low, high = np.quantile(shares, [0.05, 0.95])
        axis.plot([100 * low, 100 * high], [y, y], color=INSIDE, linewidth=3, alpha=0.55)
        axis.plot(100 * shares.mean(), y, "o", color="black", markersize=4)
    axis.axvline(50, color="0.4", linewidth=1, linestyle="dashed")
    axis.set_xlim(-2, 102)
    axis.set_xlabel("share of +1 (%)")
    _right_column(axis, [_percent(constant_share(shares)) for shares in balance.values()], "constant")
    return figure


def constant_share(shares: np.ndarray) -> float:
    """Returns the share of channels whose signs are all +1 or none of them."""
    return float(np.mean((shares == 0) | (shares == 1)))


def attention(image: np.ndarray, blocks: Sequence[Block], seen: Seen, binary: bool) -> Any:
    """Draws attention over an image, one row for the first and the last block of each stage that attends."""
    chosen = figures.ends_of_stages(figures.attending(blocks))
    rows = [attention_row(block, seen, binary) for block in chosen]
    columns = 1 + len(rows[0])
    figure, axes = subplots(len(rows), columns, figsize=(2.1 * columns + 0.8, 1.95 * len(rows) + 0.4))
    for line, block, row in zip(axes, chosen, rows, strict=True):
        _background(line[0], image)
        _mark(line[0], block, len(image))
        text = _block_text(block, seen, binary, len(next(iter(row.values()))))
        line[0].set_ylabel(text, fontsize=9, rotation=0, ha="right", va="center", labelpad=8)
        for axis, (title, values) in zip(line[1:], row.items(), strict=True):
            _map(figure, axis, len(image), values)
            if title.startswith("central"):
                _mark(axis, block, len(image))
            if block is chosen[0]:
                axis.set_title(title, fontsize=10)
    return figure


def attention_row(block: Block, seen: Seen, binary: bool) -> dict[str, np.ndarray]:
    """Returns the maps of a block by title: for each query the softmax, and what is used if it differs."""
    forms = {"softmax": seen.softmax} | ({"as used": seen.used} if binary else {})
    maps = {
        form: figures.attention_maps(figures.whole_attention(attention[block.index], block), block)
        for form, attention in forms.items()
    }
    return {f"{query}\n{form}": maps[form][query] for query in maps["softmax"] for form in forms}


def _block_text(block: Block, seen: Seen, binary: bool, keys: int) -> str:
    lines = [f"stage {block.stage}", block.name.rpartition("_")[2], f"{block.side}×{block.side} tokens"]
    if keys != block.side:
        lines.append(f"attend to {keys}×{keys} keys")
    if binary:
        lines.append(f"{_percent(float(np.mean(seen.used[block.index] != 0)))} not 0")
    if merged := figures.merged_share(seen.softmax[block.index], block):
        lines.append(f"{_percent(merged)} to merged")
    return "\n".join(lines)


def _background(axis: Any, image: np.ndarray) -> None:
    size = len(image)
    axis.imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=255, extent=(0, size, size, 0))
    axis.set_xticks([])
    axis.set_yticks([])


def _map(figure: Any, axis: Any, size: int, values: np.ndarray) -> None:
    """Draws a map in the colours of its bar, so not over the image."""
    axis.set_xticks([])
    axis.set_yticks([])
    drawn = axis.imshow(values, cmap="inferno", extent=(0, size, size, 0), interpolation="nearest")
    low, high = float(values.min()), float(values.max())
    if low == high:  # all or nothing, not the middle of the scale
        drawn.set_clim(min(low, 0.0), max(high, 0.0) if low else 1.0)
    bar = figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.ax.locator_params(nbins=4)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
    bar.update_ticks()


def _mark(axis: Any, block: Block, size: int) -> None:
    cell = size / block.side
    corner = (block.side // 2 * cell, block.side // 2 * cell)
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor="cyan", linewidth=1.5))


def branches(scales: dict[str, list[np.ndarray | None]]) -> Any:
    """Draws the factors of the branches: mean magnitudes, and the spread of all but the main branches."""
    pooling = [name for name in scales if name not in figures.MAIN_SCALES]
    count = len(scales[pooling[0]])
    magnitudes = np.array(
        [[np.nan if a is None else np.abs(a).mean() for a in found] for found in scales.values()]
    )
    width = max(9.0, 0.55 * count + 2.5)
    columns = min(4, len(pooling))
    rows = -(-len(pooling) // columns)
    figure = new_figure((width, 0.4 * len(scales) + 1.0 + 2.3 * rows))
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[0.4 * len(scales) + 0.6, *[2.2] * rows])
    axis = figure.add_subplot(grid[0, :])
    image = axis.imshow(magnitudes, aspect="auto", cmap="viridis", vmin=0)
    for (y, x), value in np.ndenumerate(magnitudes):
        if np.isnan(value):
            continue
        dark = value < 0.6 * np.nanmax(magnitudes)
        axis.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
    axis.set_yticks(range(len(scales)), list(scales), fontsize=9)
    axis.set_xticks(range(count), range(count))
    axis.set_title("mean magnitude of the factors of each block", fontsize=10)
    figure.colorbar(image, ax=axis, pad=0.01)
    first = None
    for i, name in enumerate(pooling):
        first = axis = figure.add_subplot(grid[1 + i // columns, i % columns], sharey=first)
        spread = [np.quantile(a, [0.05, 0.5, 0.95]) for a in scales[name] if a is not None]
        low, middle, high = np.transpose(spread)
        axis.fill_between(range(count), low, high, alpha=0.25, linewidth=0)
        axis.plot(range(count), middle, marker="o", markersize=3)
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("block")
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def positions(embeddings: Sequence[np.ndarray]) -> Any:
    """Draws the cosine similarity of positions, one square of tiles per stage."""
    columns = min(2, len(embeddings))
    rows = -(-len(embeddings) // columns)
    figure, axes = subplots(rows, columns, figsize=(4.7 * columns + 0.9, 4.8 * rows))
    for axis in axes.flat[len(embeddings) :]:
        axis.axis("off")
    for stage, (axis, grid) in enumerate(zip(axes.flat, embeddings)):
        side, gap = len(grid), max(1, len(grid) // 8)
        # More tiles than this would have less than a pixel per position.
        lines, similarity = figures.position_similarity(grid, min(MAX_TILES, max(2, 420 // (side + gap))))
        image = axis.imshow(_sheet(similarity, gap), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        places = [i * (side + gap) + (side - 1) / 2 for i in range(len(lines))]
        axis.set_xticks(places, lines, fontsize=8)
        axis.set_yticks(places, lines, fontsize=8)
        axis.tick_params(length=0)
        axis.set_frame_on(False)
        axis.set_title(f"stage {stage}: {side}×{side} positions", fontsize=11)
        axis.set_xlabel("column of the position")
        axis.set_ylabel("row of the position")
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8, pad=0.01)
    return figure


def _sheet(tiles: np.ndarray, gap: int) -> np.ndarray:
    """Returns square tiles (rows, columns, side, side) next to each other, NaN between them."""
    rows, columns, side = tiles.shape[:3]
    sheet = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap), np.nan)
    for y, x in np.ndindex(rows, columns):
        top, left = y * (side + gap), x * (side + gap)
        sheet[top : top + side, left : left + side] = tiles[y, x]
    return sheet


def biases(params: Any, blocks: Sequence[Block]) -> Any:
    """Draws the relative position biases of a Swin, one row per block and one column per head."""
    rows = [(block, figures.position_biases(params, block)) for block in figures.ends_of_stages(blocks)]
    columns = min(MAX_TILES, max(len(biases) for _, biases in rows))
    figure, axes = subplots(len(rows), columns, figsize=(1.35 * columns + 2.2, 1.45 * len(rows) + 0.3))
    for line, (block, biases) in zip(axes, rows, strict=True):
        limit = np.abs(biases).max() or 1.0
        reach = biases.shape[-1] // 2
        for axis in line:
            axis.axis("off")
        for head, (axis, bias) in enumerate(zip(line, biases)):
            axis.axis("on")
            extent = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
            image = axis.imshow(bias, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
            axis.set_xticks([-reach, 0, reach])
            axis.set_yticks([-reach, 0, reach] if head == 0 else [])
            axis.tick_params(labelsize=7)
            axis.set_title(f"head {head}", fontsize=8)
        line[0].set_ylabel(
            f"stage {block.stage}\n{block.name.rpartition('_')[2]}",
            fontsize=9,
            rotation=0,
            ha="right",
            va="center",
        )
        figure.colorbar(image, ax=list(line), pad=0.01, aspect=12).ax.tick_params(labelsize=7)
    return figure


def _layer_axis(layers: Sequence[str]) -> Any:
    """Returns a figure with a line for each layer, the first on top."""
    figure, axes = subplots(1, 1, figsize=(10, ROW * len(layers) + 0.9))
    axis = axes.item()
    axis.set_yticks(range(len(layers)), [long_layer(layer) for layer in layers], fontsize=8)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.grid(alpha=0.3)
    return figure, axis


def _right_column(axis: Any, texts: Sequence[str], title: str) -> None:
    for y, text in enumerate(texts):
        axis.text(1.01, y, text, transform=axis.get_yaxis_transform(), fontsize=8, va="center")
    axis.text(1.01, 1.0, title, transform=axis.transAxes, fontsize=9, va="bottom")


def long_layer(layer: str) -> str:
    """Returns the path of a layer without a trailing ``/dense``."""
    return layer.removesuffix("/dense")


def short_layer(layer: str) -> str:
    """Returns the name of a layer within its block."""
    return long_layer(layer).rpartition("/")[2].replace("_", " ")


def _percent(share: float) -> str:
    """Returns a share in percent, 100 and 0 only where they are exact."""
    if 0 < share < 0.001 or 0.999 < share < 1:
        return "<0.1 %" if share < 0.5 else ">99.9 %"
    return f"{100 * share:.3g} %"


def _wrapped(text: str, width: int) -> str:
    words, lines = text.split(), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
