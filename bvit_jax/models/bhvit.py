"""BHViT: a pyramid of binary convolutions, then of attention in windows with merged tokens.

Source: Gao et al., "BHViT: Binarized Hybrid Vision Transformer" (CVPR 2025), in the behaviour of
github.com/IMRL/BHViT. What its code ties to 224 pixels follows the image size here.
"""

import itertools
import math
from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax.binary import levels, products
from bvit_jax.binary.codes import Codes
from bvit_jax.binary.estimators import straight_through
from bvit_jax.binary.gsb import gsb_probabilities
from bvit_jax.binary.products import ProductConfig, accumulator_dtype
from bvit_jax.binary.weights import DENSE, RECU, WeightRule
from bvit_jax.binary.zero_point import scale_gradient
from bvit_jax.layers import sown
from bvit_jax.layers.activation import (
    DropPath,
    LayerScale,
    RPReLU,
    drop_path_rates,
    softmax,
    weighted_sum,
)
from bvit_jax.layers.dense import BinaryConv
from bvit_jax.layers.first_values import learned_values
from bvit_jax.layers.grid import channel_shift, mean_shift, merge_tokens, to_grid, to_tokens, upsample
from bvit_jax.layers.norm import LayerNorm
from bvit_jax.models import settings
from bvit_jax.models.blocks import BinaryFeedForward, BinaryUnit, UnitConfig, real_attention
from bvit_jax.models.embedding import Downsample, ImageEmbedding
from bvit_jax.models.execution.stages import run_blocks
from bvit_jax.models.head import Attention, ModelOutput, average_tokens, classify, model_output
from bvit_jax.models.settings import Family
from bvit_jax.models.windows import Window

DILATIONS = (1, 3, 5)  # of the three convolutions of a token mixer
GROUPS = 4
SHIFTS = (3, 5)
MIXED_STAGES = 2  # the first ones, which have token mixers in place of attention


@dataclass(frozen=True)
class BHViTConfig(UnitConfig):
    """Settings that all blocks of BHViT share.

    Attributes:
      shift_branches: sizes of the circular shifts, 3 and 5 in the paper; (): none.
      gsb: whether attention probabilities are those of `bvit_jax.binary.gsb` in place of four levels.
      recu: whether the gradient of linear layers' weights is `bvit_jax.binary.weights.Rectified`.
    """

    shift_branches: tuple[int, ...] = SHIFTS
    gsb: bool = False
    recu: bool = False

    def validate(self) -> None:
        """Raises `UserError` for a value out of range."""
        super().validate()
        allowed = ((), (3,), (5,), SHIFTS)
        settings.require_choice("shift_branches", tuple(self.shift_branches), allowed)

    @property
    def rule(self) -> WeightRule:
        """How the weights of linear layers become one bit."""
        return RECU if self.recu else DENSE


class LevelQuantizer(nn.Module):
    """Quantises three times the attention probabilities to levels; takes (batch, heads, queries, keys).

    Each head has a learned step and zero point, which start from the first batch. Their gradient is scaled by
    the size of the whole input, the batch of all devices included.
    """

    @nn.compact
    def __call__(self, x: Array, *, first_batch: bool = False) -> Codes:
        heads = x.shape[1]

        def first() -> dict[str, Array]:
            zero_point: Array = self.get_variable("params", "zero_point")
            return dict(zip(("alpha", "zero_point"), levels.first_levels(x, zero_point), strict=True))

        values = learned_values(self, {"alpha": 1.0, "zero_point": 0.0}, heads, first, first_batch)
        factor = heads / math.sqrt(levels.LARGEST * x.size)
        scaled = {
            name: scale_gradient(value, jnp.asarray(factor, value.dtype)).reshape(heads, 1, 1)
            for name, value in values.items()
        }
        codes = levels.quantize_levels(x, scaled["alpha"], scaled["zero_point"])
        sown.watch_levels(self, codes.values, values["alpha"])
        return codes


class TokenMixer(nn.Module):
    """Adds three dilated binary convolutions of a shifted grid, and normalises; returns its tokens."""

    config: BHViTConfig

    @nn.compact
    def __call__(self, grid: Array, *, train: bool) -> Array:
        c, width = self.config, grid.shape[-1]
        move = self.param("move", nn.initializers.zeros, (1, 1, 1, width)).reshape(width)
        branches = []
        for i, dilation in enumerate(DILATIONS, 1):
            conv = BinaryConv(width, dilation, GROUPS, rule=DENSE, name=f"conv{i}", **c.quantizer())
            branches.append(RPReLU(name=f"rprelu{i}")(to_tokens(conv(grid, move))))
        return c.make_norm("norm")(sum(branches[1:], branches[0]), train=train)


class WindowTokens(nn.Module):
    """The tokens of each window, followed by the merged tokens of the whole grid, normalised together.

    Takes (batch, tokens, channels) and returns (batch * windows, tokens of a window + windows, channels).
    """

    window: Window
    config: BHViTConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, windows = x.shape[-1], (self.window.side // self.window.size) ** 2
        share = self.param("share", nn.initializers.constant(0.5), (1, 1, width))
        merged = merge_tokens(x, self.window.size, share)
        merged = jnp.repeat(merged, windows, axis=0).astype(x.dtype)
        tokens = jnp.concatenate([self.window.split(x), merged], axis=1)
        return LayerNorm(self.config.norm_epsilon, name="norm")(tokens)


class WindowAttention(nn.Module):
    """Binary attention of the tokens of a window to each other and to the merged tokens of the whole grid.

    Returns:
      Tokens (batch, tokens, channels), and the attention probabilities (batch * windows, heads, queries,
      keys).
    """

    num_heads: int
    window_size: int
    config: BHViTConfig

    @nn.compact
    def __call__(self, x: Array, *, train: bool, first_batch: bool) -> tuple[Array, Attention]:
        c, width = self.config, x.shape[-1]
        window = Window(math.isqrt(x.shape[1]), self.window_size, 0)
        tokens = WindowTokens(window, c, name="tokens")(x).astype(c.dtype)
        q, k, v = (
            BinaryUnit(width, c, name=name)(tokens, tokens, train=train) for name in ("query", "key", "value")
        )
        heads = (self._heads(q, "query_move"), self._heads(k, "key_move"), self._heads(v, "value_move"))
        if c.act_bits == 1:
            context, attention = self._attend(*heads, train=train, first_batch=first_batch)
        else:
            context, attention = real_attention(c, *heads, train=train)
        context = c.make_norm("norm")(context.reshape(tokens.shape), train=train)
        context = c.variants(train=train).materialize(context + q + k + v)
        context = RPReLU(name="rprelu")(context)
        return self._join(context, window).astype(c.dtype), attention

    def _heads(self, x: Array, move: str) -> Array:
        """Shifts (batch, tokens, channels) and splits it into (batch, tokens, heads, size)."""
        shift = self.param(move, nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(accumulator_dtype(x.dtype)) + shift
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def _attend(
        self, q: Array, k: Array, v: Array, *, train: bool, first_batch: bool
    ) -> tuple[Array, Attention]:
        c = self.config
        for name, x in (("query_move", q), ("key_move", k), ("value_move", v)):
            sown.watch_sign(self, x, c.sign, name)
        product = ProductConfig(c.dtype, c.sign, integer_products=c.execution.integer_products)
        probs = softmax(products.binary_scores(q, k, product) / math.sqrt(q.shape[-1]))
        values = straight_through(c.sign)(v)
        if c.gsb:
            masked = self._gsb(probs)
            sown.watch_heads(self, masked)
            weights = nn.Dropout(c.attention_dropout)(masked, deterministic=not train)
            context = weighted_sum(weights.astype(c.dtype), values.astype(c.dtype), values.dtype)
            return context, Attention(probs, masked)
        used = LevelQuantizer(name="prob_act")(levels.LARGEST * probs, first_batch=first_batch)
        sown.watch_heads(self, used.values)
        kept = used
        if train and c.attention_dropout > 0:
            kept = used.dropped(c.attention_dropout, self.make_rng("dropout"))
        context = products.code_product(kept.values, values, "bhqk,bkhd->bqhd", c.dtype)
        return context * kept.scale.reshape(-1, 1), Attention(probs, used.dequantize())

    def _gsb(self, probs: Array) -> Array:
        starts = {"prob_scale": 0.005, "prob_scale2": 1.0, "prob_scale3": 1.0}
        scales = (self.param(name, nn.initializers.constant(start), ()) for name, start in starts.items())
        return gsb_probabilities(probs, *scales)

    def _join(self, x: Array, window: Window) -> Array:
        """Puts tokens back in their places, mixed with the mean of what the windows made of merged tokens."""
        share = self.param("share", nn.initializers.constant(0.5), (1, 1, 1, x.shape[-1]))[0]
        inside, count = window.size**2, (window.side // window.size) ** 2
        own = window.join(x[:, :inside])
        merged = x[:, inside:].reshape(-1, count, count, x.shape[-1]).mean(axis=1)
        return share * own + (1 - share) * upsample(merged, window.size)


class BHViTBlock(nn.Module):
    """One block: a token mixer, or attention where there are heads; then feed-forward and shift branches.

    Returns:
      Tokens (batch, tokens, channels) in the compute dtype, and the attention probabilities, if any.
    """

    num_heads: int
    window_size: int
    mlp_dim: int
    drop_path: float | Array
    config: BHViTConfig

    @nn.compact
    def __call__(self, x: Array, *, train: bool, first_batch: bool = False) -> tuple[Array, Attention | None]:
        c, variants = self.config, self.config.variants(train=train)
        attention = None
        if self.num_heads:
            normed = c.make_norm("attention_norm")(x, train=train).astype(c.dtype)
            attend = WindowAttention(self.num_heads, self.window_size, c, name="attention")
            y, attention = attend(normed, train=train, first_batch=first_batch)
            y = BinaryUnit(x.shape[-1], c, name="attention_output")(y, y, train=train)
            y = self._branch_end(y, "attention_scale", train=train)
        else:
            normed = c.make_norm("mixer_norm")(x, train=train).astype(c.dtype)
            y = TokenMixer(c, name="mixer")(to_grid(normed), train=train)
        x = variants.materialize(x + y)

        normed = c.make_norm("mlp_norm")(x, train=train).astype(c.dtype)
        y = BinaryFeedForward(self.mlp_dim, c, name="mlp")(normed, train=train)
        y = DropPath(self.drop_path)(self._branch_end(y, "mlp_scale", train=train), train=train)
        x = variants.materialize(y + x)
        grid = to_grid(normed)
        for size in c.shift_branches:
            shifted = {
                f"h{size}": mean_shift(grid, size, axis=1),
                f"w{size}": mean_shift(grid, size, axis=2),
                f"ch{size}": channel_shift(grid, size // 2),
            }
            for name, branch in shifted.items():
                x = x + LayerScale(0.0, name=f"shift_{name}")(to_tokens(branch))
        return x.astype(c.dtype), attention

    def _branch_end(self, y: Array, scale_name: str, *, train: bool) -> Array:
        y = nn.Dropout(self.config.dropout)(y, deterministic=not train)
        return LayerScale(0.1, name=scale_name)(y) if self.config.layer_scale else y


class BHViT(nn.Module):
    """The pyramid: two stages of token mixers, two of attention, each twice as wide as the one before.

    ``depth`` and ``mlp_dim`` are per stage, ``num_heads`` those of the two stages with attention, ``width``
    that of the first stage.
    """

    image_size: int = 224
    patch_size: int = 4
    num_classes: int = 1000
    width: int = 64
    depth: tuple[int, ...] = (3, 4, 8, 4)
    num_heads: tuple[int, ...] = (4, 8)
    mlp_dim: tuple[int, ...] = (512, 1024, 1024, 2048)
    window_size: int = 7
    some_fp: bool = False
    drop_path: float = 0.0
    block: BHViTConfig = BHViTConfig()

    @nn.nowrap
    def validate(self) -> None:
        """Raises `UserError` if the settings do not fit together."""
        settings.require_positive(self, "width", "window_size")
        require = settings.require
        require(
            settings.require_stages(self, "depth", "mlp_dim") == 4, "depth", self.depth, "expected 4 stages"
        )
        require(len(self.num_heads) == 2, "num_heads", self.num_heads, "expected those of stages 3 and 4")
        side = settings.require_grid(self.image_size, self.patch_size)
        unit = 8 * self.window_size
        require(
            side % unit == 0,
            "image_size",
            self.image_size,
            f"the last stage's grid must consist of windows of {self.window_size}×{self.window_size} tokens;"
            f" use a multiple of {unit * self.patch_size}, or another window_size",
        )
        require(self.width % GROUPS == 0, "width", self.width, f"expected a multiple of {GROUPS}")
        for stage, mlp_dim in enumerate(self.mlp_dim):
            settings.require_expansion(mlp_dim, self.width << stage, f"mlp_dim[{stage}]")
        for stage, heads in enumerate(self.num_heads, 2):
            require(heads > 0, "num_heads", self.num_heads, "expected positive whole numbers")
            settings.require_heads(self.width << stage, heads)
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
            norm=c.norm,
            norm_epsilon=c.norm_epsilon,
            batch_norm_group=c.batch_norm_group,
            one_pass_norms=c.execution.one_pass_norms,
            gelu=True,
            grid_positions=True,
            dropout=c.dropout,
            weight_init=c.weight_init,
            dtype=c.dtype,
            name="embedding",
        )(images, train=train)
        hidden, attentions = [x], []
        rates = enumerate(drop_path_rates(self.drop_path, sum(self.depth)))
        heads = (0,) * MIXED_STAGES + tuple(self.num_heads)
        for stage, (depth, num_heads, mlp_dim) in enumerate(
            zip(self.depth, heads, self.mlp_dim, strict=True)
        ):
            if stage > 0:
                down = Downsample(self.width << stage, self.some_fp, c, DENSE, name=f"downsample{stage}")
                hidden[-1] = x = down(x, train=train)
            blocks = [
                BHViTBlock(num_heads, self.window_size, mlp_dim, rate, c, name=f"block{i}", parent=None)
                for i, rate in itertools.islice(rates, depth)
            ]
            output = run_blocks(
                self, blocks, x, train=train, capture=capture, execution=c.execution, first_batch=first_batch
            )
            x = output.tokens
            hidden += output.hidden
            attentions += [attention for attention in output.attentions if attention is not None]
        x = c.make_norm("norm")(x, train=train)
        logits = classify(average_tokens(x), self.num_classes, c.weight_init, "head")
        return model_output((logits,), hidden, attentions, capture)


FAMILY = Family(BHViT, BHViTConfig())
