"""The real-valued Swin Transformer (Liu et al., 2021): attention in shifted windows, patch merging.

Source: the paper, in the behaviour of ``models/swin_transformer.py`` of
github.com/microsoft/Swin-Transformer.
"""

import itertools
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax.layers.activation import drop_path_rates
from bvit_jax.layers.grid import to_grid, to_tokens
from bvit_jax.layers.init import kernel_init
from bvit_jax.layers.norm import LayerNorm
from bvit_jax.models.embedding import ImageEmbedding
from bvit_jax.models.execution.stages import Execution, run_blocks
from bvit_jax.models.head import ModelOutput, average_tokens, classify, model_output
from bvit_jax.models.real_block import RealBlock, RealConfig
from bvit_jax.models.windows import Window

MERGE = 2  # tokens along each side of the square that patch merging makes one token of


class PatchMerging(nn.Module):
    """Joins each 2×2 square of a grid: (batch, height, width, channels) to (batch, tokens, features)."""

    features: int
    config: RealConfig

    @nn.compact
    def __call__(self, grid: Array) -> Array:
        # Down the columns first: the order of the channels in the checkpoints.
        corners = [grid[:, i::MERGE, j::MERGE] for j in range(MERGE) for i in range(MERGE)]
        x = to_tokens(jnp.concatenate(corners, axis=-1))
        return self._reduce(LayerNorm(self.config.norm_epsilon, name="norm")(x))

    def _reduce(self, x: Array) -> Array:
        c = self.config
        init = kernel_init(c.weight_init, x.shape[-1])
        dense = nn.Dense(self.features, use_bias=False, dtype=c.dtype, kernel_init=init, name="reduction")
        return dense(x.astype(c.dtype))


class Swin(nn.Module):
    """Swin; the defaults are Swin-T. ``depth`` and ``num_heads`` are per stage.

    Stage ``i`` has ``width · 2**i`` channels. A grid no larger than the window is one window, without
    shift; otherwise every second block is shifted by half a window.
    """

    block_type: ClassVar[type[RealBlock]] = RealBlock
    merging_type: ClassVar[type[PatchMerging]] = PatchMerging

    image_size: int = 224
    patch_size: int = 4
    num_classes: int = 1000
    width: int = 96
    depth: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: int = 4
    drop_path: float = 0.0
    block: RealConfig = RealConfig(norm_epsilon=1e-5, weight_init="trunc_normal")
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False, capture: bool = False) -> ModelOutput:
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
                x = self.merging_type(width, c, name=f"downsample{stage}")(to_grid(x))
                hidden[-1] = x
                side //= MERGE
            blocks = [
                self.block_type(
                    num_heads,
                    self.mlp_ratio * width,
                    drop_path,
                    c,
                    stage_window(side, self.window_size, shifted=i % 2 == 1),
                    name=f"stage{stage}_block{i}",
                    parent=None,
                )
                for i, drop_path in enumerate(itertools.islice(rates, depth))
            ]
            output = run_blocks(self, blocks, x, train=train, capture=capture, execution=self.execution)
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
