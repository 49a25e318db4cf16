"""The real-valued DeiT (Touvron et al., 2021): teacher and full-precision baseline."""

from flax import linen as nn
from jax import Array

from bvit_jax.layers.activation import drop_path_rates
from bvit_jax.layers.norm import LayerNorm
from bvit_jax.models import settings
from bvit_jax.models.embedding import ImageEmbedding
from bvit_jax.models.execution.stages import run_blocks
from bvit_jax.models.head import ModelOutput, classify, model_output
from bvit_jax.models.settings import Family
from bvit_jax.models.transformer import REAL, Layers, TransformerBlock, TransformerConfig


class DeiT(nn.Module):
    """DeiT with a class token; widths 192, 384 and 768 are DeiT-Ti, -S and -B.

    ``distillation_token`` adds a second token, ``distillation_head`` a second classifier that reads
    it; the logits are then the mean of both. ``norm_epsilon`` goes with the checkpoint: 1e-6 for
    timm's and Facebook's, 1e-12 for Hugging Face's, 1e-5 in the reference's own training code.
    """

    image_size: int = 224
    patch_size: int = 16
    num_classes: int = 1000
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_dim: int = 1536
    distillation_token: bool = False
    distillation_head: bool = False
    drop_path: float = 0.0
    block: TransformerConfig = TransformerConfig()
    layers: Layers = REAL

    @nn.nowrap
    def validate(self) -> None:
        """Raises `UserError` if the settings do not fit together."""
        settings.require_one_stage(self)
        settings.require(
            self.distillation_token or not self.distillation_head,
            "distillation_head",
            True,
            "it reads the distillation token; set distillation_token to True",
        )

    @nn.compact
    def __call__(
        self, images: Array, *, train: bool = False, capture: bool = False, first_batch: bool = False
    ) -> ModelOutput:
        """Classifies images.

        Args:
          images: (batch, image_size, image_size, 3), normalised.
          train: whether dropout and drop-path act; they draw from the "dropout" stream.
          capture: whether to return hidden states and attentions too.
          first_batch: whether learned values that start from the first batch are set from these images; see
            `bvit_jax.layers.first_values`.
        """
        c = self.block
        x = ImageEmbedding(
            self.width,
            self.patch_size,
            tokens=("class_token", "distillation_token")[: 1 + self.distillation_token],
            dropout=c.dropout,
            weight_init=c.weight_init,
            dtype=c.dtype,
            name="embedding",
        )(images, train=train)
        blocks = [
            TransformerBlock(
                self.num_heads, self.mlp_dim, drop_path, c, layers=self.layers, name=f"block{i}", parent=None
            )
            for i, drop_path in enumerate(drop_path_rates(self.drop_path, self.depth))
        ]
        stage = run_blocks(
            self, blocks, x, train=train, capture=capture, execution=c.execution, first_batch=first_batch
        )
        hidden = [x, *stage.hidden]
        x = LayerNorm(c.norm_epsilon, name="norm")(stage.tokens)
        heads = ("head", "distillation_head")[: 1 + self.distillation_head]
        logits = tuple(
            classify(x[:, i], self.num_classes, c.weight_init, name) for i, name in enumerate(heads)
        )
        return model_output(logits, hidden, stage.attentions, capture)


FAMILY = Family(DeiT, TransformerConfig())
