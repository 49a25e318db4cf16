"""The ReActNet-DeiT family: a binary DeiT with extra residuals, and each ablation of the paper.

Source: BinaryViT (CVPRW 2023), section 3 and table of ablations, in the behaviour of
``modeling_vit_extra_res.py`` of github.com/Phuoc-Hoan-Le/BinaryViT.
"""

from flax import linen as nn
from jax import Array

from bvit_jax.layers.activation import drop_path_rates
from bvit_jax.models import settings
from bvit_jax.models.blocks import BinaryBlock, BlockConfig
from bvit_jax.models.embedding import ImageEmbedding
from bvit_jax.models.execution.stages import run_blocks
from bvit_jax.models.head import ModelOutput, average_tokens, classify, model_output
from bvit_jax.models.settings import Family


class ReActDeiT(nn.Module):
    """A one-stage binary transformer with a class token or average pooling.

    The switches of the ablation are ``class_token``, ``block.pool_branches`` and
    ``block.layer_scale``; pooling branches need the token grid and so exclude the class token.
    """

    image_size: int = 224
    patch_size: int = 16
    num_classes: int = 1000
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_dim: int = 1536
    class_token: bool = False
    drop_path: float = 0.0
    block: BlockConfig = BlockConfig()

    @nn.nowrap
    def validate(self) -> None:
        """Raises `UserError` if the settings do not fit together."""
        settings.require_one_stage(self)
        settings.require_expansion(self.mlp_dim, self.width)
        settings.require(
            not (self.class_token and self.block.pool_branches),
            "class_token",
            True,
            "pooling branches need the token grid; set pool_branches to () or class_token to False",
        )

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False, capture: bool = False) -> ModelOutput:
        """Classifies images; the arguments are those of `bvit_jax.models.deit.DeiT`."""
        c = self.block
        x = ImageEmbedding(
            self.width,
            self.patch_size,
            tokens=("class_token",) if self.class_token else (),
            dropout=c.dropout,
            weight_init=c.weight_init,
            dtype=c.dtype,
            name="embedding",
        )(images, train=train)
        blocks = [
            BinaryBlock(self.num_heads, self.mlp_dim, 1, drop_path, c, name=f"block{i}", parent=None)
            for i, drop_path in enumerate(drop_path_rates(self.drop_path, self.depth))
        ]
        stage = run_blocks(self, blocks, x, train=train, capture=capture, execution=c.execution)
        hidden = [x, *stage.hidden]
        x = c.make_norm("norm")(stage.tokens, train=train)
        pooled = x[:, 0] if self.class_token else average_tokens(x)
        logits = classify(pooled, self.num_classes, c.weight_init, "head")
        return model_output((logits,), hidden, stage.attentions, capture)


FAMILY = Family(ReActDeiT, BlockConfig())
