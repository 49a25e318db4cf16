"""The real-valued Swin Transformer (Liu et al., 2021): attention in shifted windows, patch merging.

Source: the paper, in the behaviour of ``models/swin_transformer.py`` of
github.com/microsoft/Swin-Transformer.
"""

import itertools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax.layers.activation import drop_path_rates
from bvit_jax.layers.grid import to_grid, to_tokens
from bvit_jax.layers.norm import LayerNorm
from bvit_jax.models import settings
from bvit_jax.models.embedding import ImageEmbedding
from bvit_jax.models.execution.stages import run_blocks
from bvit_jax.models.head import ModelOutput, average_tokens, classify, model_output
from bvit_jax.models.settings import Family
from bvit_jax.models.transformer import REAL, Layers, TransformerBlock, TransformerConfig
from bvit_jax.models.windows import Window

MERGE = 2  # tokens along each side of the square that patch merging makes one token of


class PatchMerging(nn.Module):
    """Joins each 2×2 square of a grid: (batch, height, width, channels) to (batch, tokens, features)."""

    features: int
    config: TransformerConfig
    layers: Layers = REAL

    @nn.compact
    def __call__(self, grid: Array, *, first_batch: bool = False) -> Array:
        # Down the columns first: the order of the channels in the checkpoints.
        corners = [grid[:, i::MERGE, j::MERGE] for j in range(MERGE) for i in range(MERGE)]
        x = to_tokens(jnp.concatenate(corners, axis=-1))
        x = LayerNorm(self.config.norm_epsilon, name="norm")(x)
        return self.layers.reduce(self.config, self.features, x, first_batch=first_batch)


class Swin(nn.Module):
    """Swin; the defaults are Swin-T. ``depth`` and ``num_heads`` are per stage.

    Stage ``i`` has ``width · 2**i`` channels. A grid no larger than the window is one window, without
    shift; otherwise every second block is shifted by half a window.
    """

    image_size: int = 224
    patch_size: int = 4
    num_classes: int = 1000
    width: int = 96
    depth: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: int = 4
    drop_path: float = 0.0
    block: TransformerConfig = TransformerConfig(norm_epsilon=1e-5, weight_init="trunc_normal")
    layers: Layers = REAL

    @nn.nowrap
    def validate(self) -> None:
        """Raises `UserError` if the settings do not fit together."""
        stages = settings.require_stages(self, "depth", "num_heads")
        settings.require_positive(self, "width", "window_size", "mlp_ratio")
        side = settings.require_grid(self.image_size, self.patch_size)
        for stage, num_heads in enumerate(self.num_heads):
            settings.require_heads(self.width * MERGE**stage, num_heads)
            window = min(self.window_size, side)
            settings.require(
                side % window == 0 and (stage + 1 == stages or side % MERGE == 0),
                "image_size",
                self.image_size,
                f"stage {stage} has a {side}×{side} token grid, which windows of {window} must divide, and"
                f" {MERGE} before another stage; use a multiple of"
                f" {self.patch_size * MERGE ** (stages - 1) * self.window_size}",
            )
            side //= MERGE
        settings.require_rates(self, "drop_path")
        settings.require_classes(self.num_classes)

    @nn.compact
    def __call__(
        self, images: Array, *, train: bool = False, capture: bool = False, first_batch: bool = False
    ) -> ModelOutput:
        """Classifies images; the arguments are those of `bvit_jax.models.deit.DeiT`."""
        c = self.block
        x = ImageEmbedding(
            self.width,
            self.patch_size,
            tokens=(),
            norm="layer_norm",
            norm_epsilon=c.norm_epsilon,
            positions=False,
            dropout=c.dropout,
            weight_init="torch",  # the original initialises linear layers only
            dtype=c.dtype,
            name="embedding",
        )(images, train=train)
        hidden, attentions = [x], []
        side = self.image_size // self.patch_size
        rates = iter(drop_path_rates(self.drop_path, sum(self.depth)))
        for stage, (depth, num_heads) in enumerate(zip(self.depth, self.num_heads, strict=True)):
            width = self.width * MERGE**stage
            if stage > 0:
                merge = PatchMerging(width, c, self.layers, name=f"downsample{stage}")
                x = merge(to_grid(x), first_batch=first_batch)
                hidden[-1] = x
                side //= MERGE
            blocks = [
                TransformerBlock(
                    num_heads,
                    self.mlp_ratio * width,
                    drop_path,
                    c,
                    stage_window(side, self.window_size, shifted=i % 2 == 1),
                    self.layers,
                    name=f"stage{stage}_block{i}",
                    parent=None,
                )
                for i, drop_path in enumerate(itertools.islice(rates, depth))
            ]
            output = run_blocks(
                self, blocks, x, train=train, capture=capture, execution=c.execution, first_batch=first_batch
            )
            x = output.tokens
            hidden += output.hidden
            attentions += output.attentions
        x = LayerNorm(c.norm_epsilon, name="norm")(x)
        logits = classify(average_tokens(x), self.num_classes, c.weight_init, "head")
        return model_output((logits,), hidden, attentions, capture)


def stage_window(side: int, size: int, *, shifted: bool) -> Window:
    """Returns the windows of a block on a grid of ``side``×``side`` tokens."""
    if side <= size:
        return Window(side, side, 0)
    return Window(side, size, size // 2 if shifted else 0)


FAMILY = Family(Swin, Swin.block)
