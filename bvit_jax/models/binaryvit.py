"""BinaryViT: the four-stage pyramid, fully binary or with real patch embeddings between stages.

Source: BinaryViT (CVPRW 2023), section 3, in the behaviour of
``modeling_vit_extra_res_pyramid.py`` of github.com/Phuoc-Hoan-Le/BinaryViT.
"""

import itertools

from flax import linen as nn
from jax import Array

from bvit_jax.layers.activation import drop_path_rates
from bvit_jax.models import settings
from bvit_jax.models.blocks import BinaryBlock, BlockConfig
from bvit_jax.models.embedding import STRIDE, Downsample, ImageEmbedding
from bvit_jax.models.execution.stages import run_blocks
from bvit_jax.models.head import ModelOutput, average_tokens, classify, model_output
from bvit_jax.models.settings import Family


class BinaryViT(nn.Module):
    """The pyramid; ``width``, ``depth``, ``num_heads``, ``mlp_dim`` and ``reduction`` are per stage."""

    image_size: int = 224
    patch_size: int = 4
    num_classes: int = 1000
    width: tuple[int, ...] = (64, 128, 256, 512)
    depth: tuple[int, ...] = (3, 4, 8, 4)
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_dim: tuple[int, ...] = (512, 1024, 1024, 2048)
    reduction: tuple[int, ...] = (8, 4, 1, 1)
    some_fp: bool = False
    drop_path: float = 0.0
    block: BlockConfig = BlockConfig()

    @nn.nowrap
    def validate(self) -> None:
        """Raises `UserError` if the settings do not fit together."""
        stages = settings.require_stages(self, "width", "depth", "num_heads", "mlp_dim", "reduction")
        side = settings.require_grid(self.image_size, self.patch_size)
        for stage, (width, reduction) in enumerate(zip(self.width, self.reduction, strict=True)):
            settings.require_heads(width, self.num_heads[stage], f"width[{stage}]")
            settings.require_expansion(self.mlp_dim[stage], width, f"mlp_dim[{stage}]")
            settings.require(
                side % reduction == 0,
                f"reduction[{stage}]",
                reduction,
                f"it must divide the stage's {side}×{side} token grid; change it or the image size",
            )
            if stage + 1 == stages:
                break
            settings.require(
                side % STRIDE == 0,
                "image_size",
                self.image_size,
                f"stage {stage} has a {side}×{side} token grid, which {STRIDE} must divide; "
                f"use a multiple of {self.patch_size * STRIDE ** (stages - 1)}",
            )
            side //= STRIDE
            wider = self.width[stage + 1]
            settings.require(
                self.some_fp or wider % width == 0,
                f"width[{stage + 1}]",
                wider,
                f"expected a multiple of the previous stage's {width}",
            )
        settings.require_rates(self, "drop_path")
        settings.require_classes(self.num_classes)

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False, capture: bool = False) -> ModelOutput:
        """Classifies images; the arguments are those of `bvit_jax.models.deit.DeiT`."""
        c = self.block
        x = ImageEmbedding(
            self.width[0],
            self.patch_size,
            tokens=(),
            norm=c.norm,
            norm_epsilon=c.norm_epsilon,
            batch_norm_group=c.batch_norm_group,
            one_pass_norms=c.execution.one_pass_norms,
            dropout=c.dropout,
            weight_init=c.weight_init,
            dtype=c.dtype,
            name="embedding",
        )(images, train=train)
        hidden, attentions = [x], []
        rates = enumerate(drop_path_rates(self.drop_path, sum(self.depth)))
        stages = zip(self.depth, self.num_heads, self.mlp_dim, self.reduction, strict=True)
        for stage, (depth, num_heads, mlp_dim, reduction) in enumerate(stages):
            if stage > 0:
                x = Downsample(self.width[stage], self.some_fp, c, name=f"downsample{stage}")(x, train=train)
                hidden[-1] = x
            blocks = [
                BinaryBlock(num_heads, mlp_dim, reduction, drop_path, c, name=f"block{i}", parent=None)
                for i, drop_path in itertools.islice(rates, depth)
            ]
            output = run_blocks(self, blocks, x, train=train, capture=capture, execution=c.execution)
            x = output.tokens
            hidden += output.hidden
            attentions += output.attentions
        x = c.make_norm("norm")(x, train=train)
        logits = classify(average_tokens(x), self.num_classes, c.weight_init, "head")
        return model_output((logits,), hidden, attentions, capture)


FAMILY = Family(BinaryViT, BlockConfig())
