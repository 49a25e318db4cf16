"""The blocks of the binary models: unit, attention, feed-forward, encoder block.

Source: BinaryViT (CVPRW 2023), section 3, in the behaviour of ``modeling_vit_extra_res_pyramid.py``
of github.com/Phuoc-Hoan-Le/BinaryViT. Tokens are (batch, tokens, channels) throughout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, get_args

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from bvit_jax.binary import products
from bvit_jax.binary.estimators import ESTIMATORS, Estimator
from bvit_jax.binary.probabilities import above, quantize_probs
from bvit_jax.binary.products import ProductConfig, accumulator_dtype
from bvit_jax.binary.weights import DENSE, WeightRule
from bvit_jax.layers import sown
from bvit_jax.layers.activation import DropPath, LayerScale, RPReLU, softmax, weighted_sum
from bvit_jax.layers.dense import BinaryDense
from bvit_jax.layers.init import WeightInit
from bvit_jax.layers.norm import NormName, advance_statistics, make_norm
from bvit_jax.models.execution import packed_feed_forward
from bvit_jax.models.execution.stages import PLAIN, Execution
from bvit_jax.models.execution.variants import Variants, integer_variants, plain_variants
from bvit_jax.models.head import Attention
from bvit_jax.models.settings import require, require_choice, require_epsilon, require_known, require_rates


@dataclass(frozen=True)
class UnitConfig:
    """Settings that all binary units of a model share.

    Attributes:
      weight_bits, act_bits, clip_val: see `bvit_jax.layers.dense.BinaryDense`.
      estimator: the gradient of every sign of activations, a name in `bvit_jax.binary.ESTIMATORS`.
      norm, norm_epsilon: normalisation after every product and before every branch.
      batch_norm_group: number of consecutive images that a batch norm normalises together, 0 for the global
        batch; see `bvit_jax.layers.norm.BatchNorm`.
      layer_scale: whether the two main branches end in a `LayerScale`.
      dropout, attention_dropout: rates.
      weight_init: initialiser of the weight matrices.
      dtype: compute dtype, also of activations in memory.
      execution: how the blocks run; does not affect results beyond rounding.
    """

    packs_signs: ClassVar[bool] = True  # and saves integer products, and takes norms in one pass

    weight_bits: int = 1
    act_bits: int = 1
    clip_val: float = 2.5
    estimator: str = "parabola"
    norm: NormName = "batch_norm"
    norm_epsilon: float = 1e-5
    batch_norm_group: int = 0
    layer_scale: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    weight_init: WeightInit = "torch"
    dtype: DTypeLike = jnp.float32
    execution: Execution = PLAIN

    def validate(self) -> None:
        """Raises `UserError` for a value out of range."""
        require_rates(self, "dropout", "attention_dropout")
        require_epsilon(self.norm_epsilon)
        require_choice("weight_init", self.weight_init, get_args(WeightInit))
        require_choice("act_bits", self.act_bits, (1, 32))
        require_known("estimator", self.estimator, ESTIMATORS)
        require_choice("norm", self.norm, get_args(NormName))
        require_choice("weight_bits", self.weight_bits, (1, 2, 3, 4, 5, 6, 7, 8, 32))
        require(self.clip_val > 0, "clip_val", self.clip_val, "expected above 0")
        group = self.batch_norm_group
        require(group >= 0, "batch_norm_group", group, "expected a number of images, or 0")
        require(
            group == 0 or self.norm == "batch_norm",
            "batch_norm_group",
            group,
            "there are no batch norms; set it to 0 or norm to batch_norm",
        )

    @property
    def sign(self) -> Estimator:
        """The sign of activations."""
        return ESTIMATORS[self.estimator]

    @property
    def rule(self) -> WeightRule:
        """How the weights of linear layers become one bit."""
        return DENSE

    def quantizer(self) -> dict:
        """Returns the keyword arguments of a quantised product."""
        names = ("weight_bits", "act_bits", "clip_val", "weight_init", "dtype")
        shared = {name: getattr(self, name) for name in names}
        return shared | {"estimator": self.sign, "integer_products": self.execution.integer_products}

    def make_norm(self, name: str) -> nn.Module:
        """Returns the normalisation called ``name``, a child of the calling module."""
        return make_norm(
            self.norm, self.norm_epsilon, name, self.batch_norm_group, self.execution.one_pass_norms
        )

    def variants(self, *, train: bool) -> Variants:
        """Returns the execution variant of the steps between products."""
        if self.execution.integer_products and train:
            return integer_variants(self.dtype)
        return plain_variants(train=train)


@dataclass(frozen=True)
class BlockConfig(UnitConfig):
    """Settings that all blocks of BinaryViT share.

    Attributes:
      pool_branches: kernel sizes of the pooling branches, 3 and 5 in the paper.
      prob_scale_floor: the least scale of attention probabilities. 0 is the code of the paper, where a scale
        that falls below 0 has no gradient, and its head attends to nothing for good.
    """

    pool_branches: tuple[int, ...] = (3, 5)
    prob_scale_floor: float = 0.0

    def validate(self) -> None:
        """Raises `UserError` for a value out of range."""
        super().validate()
        sizes = self.pool_branches
        odd = all(size > 0 and size % 2 == 1 for size in sizes)
        require(odd, "pool_branches", sizes, "expected odd kernel sizes")
        require(len(set(sizes)) == len(sizes), "pool_branches", sizes, "expected each size once")
        floor = self.prob_scale_floor
        require(0 <= floor < 1, "prob_scale_floor", floor, "expected 0 or more, and less than 1")


class BinaryUnit(nn.Module):
    """``RPReLU(norm(W · sign(x + move)) + shortcut)``, the step around every product with weights.

    Takes (batch, tokens, channels) and a shortcut (batch, tokens, features), and returns the latter shape.
    """

    features: int
    config: UnitConfig

    @nn.compact
    def __call__(self, x: Array, shortcut: Array, *, train: bool) -> Array:
        c = self.config
        y = BinaryDense(self.features, name="dense", rule=c.rule, **c.quantizer())(x)
        y = c.make_norm("norm")(y, train=train) + shortcut
        return RPReLU(name="rprelu")(c.variants(train=train).materialize(y)).astype(c.dtype)


class BinaryAttention(nn.Module):
    """Multi-head attention whose products are binary and whose keys may be pooled.

    With ``reduction`` r > 1, keys and values come from the r×r average-pooled token grid and are
    repeated back for the shortcut around the attention product.

    Returns:
      Context (batch, tokens, channels) after its norm, shortcuts and RPReLU, and the attention
      probabilities (batch, heads, tokens, keys).
    """

    num_heads: int
    reduction: int
    config: BlockConfig

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Attention]:
        c, variants = self.config, self.config.variants(train=train)
        width = x.shape[-1]
        q = BinaryUnit(width, c, name="query")(x, x, train=train)
        z = x
        if self.reduction > 1:
            z = variants.pool(x, self.reduction)
            z = BinaryUnit(width, c, name="reduce")(z, z, train=train)
        k = BinaryUnit(width, c, name="key")(z, z, train=train)
        v = BinaryUnit(width, c, name="value")(z, z, train=train)

        attend = self._attend_binary if c.act_bits == 1 else partial(real_attention, c)
        context, attention = attend(
            self._heads(q, "query_move"),
            self._heads(k, "key_move"),
            self._heads(v, "value_move"),
            train=train,
        )
        context = context.reshape(x.shape)
        context = c.make_norm("norm")(context, train=train)
        shortcut = k.astype(context.dtype) + v
        if self.reduction > 1:
            shortcut = variants.repeat(shortcut, self.reduction)
        context = RPReLU(name="rprelu")(variants.materialize(context + q + shortcut))
        return context.astype(c.dtype), attention

    def _heads(self, x: Array, move: str) -> Array:
        """Shifts (batch, tokens, channels) and splits it into (batch, tokens, heads, size)."""
        shift = self.param(move, nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(accumulator_dtype(x.dtype)) + shift
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def _attend_binary(self, q: Array, k: Array, v: Array, *, train: bool) -> tuple[Array, Attention]:
        c = self.config
        for name, x in (("query_move", q), ("key_move", k), ("value_move", v)):
            sown.watch_sign(self, x, c.sign, name)
        product = ProductConfig(c.dtype, c.sign, integer_products=c.execution.integer_products)
        probs = softmax(products.binary_scores(q, k, product) / math.sqrt(q.shape[-1]))
        scale = self.param("prob_scale", nn.initializers.constant(0.005), ())
        if c.prob_scale_floor:
            scale = above(scale, jnp.asarray(c.prob_scale_floor, scale.dtype))
        used = quantize_probs(probs, scale)
        sown.watch_heads(self, used.values)
        kept = used
        if train and c.attention_dropout > 0:
            kept = used.dropped(c.attention_dropout, self.make_rng("dropout"))
        context = products.binary_context(kept.values, v, product) * kept.scale
        return context, Attention(probs, used.dequantize())


def real_attention(
    config: UnitConfig, q: Array, k: Array, v: Array, *, train: bool
) -> tuple[Array, Attention]:
    """Attends with real products; called in a compact method, with (batch, tokens, heads, size) each."""
    dtype = q.dtype
    q, k, v = (a.astype(config.dtype) for a in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype)
    probs = softmax(scores / math.sqrt(q.shape[-1]))
    kept = nn.Dropout(config.attention_dropout)(probs, deterministic=not train)
    return weighted_sum(kept.astype(config.dtype), v, dtype), Attention(probs, probs)


class BinaryFeedForward(nn.Module):
    """Two binary units: widen with repeated shortcuts, narrow with averaged ones."""

    mlp_dim: int
    config: UnitConfig

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self._packs(x, train):
            return self._packed(x, train)
        variants = self.config.variants(train=train)
        width = x.shape[-1]
        expansion = self.mlp_dim // width
        tiled = variants.tile(x, expansion)
        u = BinaryUnit(self.mlp_dim, self.config, name="expand")(x, tiled, train=train)
        shortcut = variants.mean_channels(u, expansion)
        return BinaryUnit(width, self.config, name="contract")(u, shortcut, train=train)

    def _packs(self, x: Array, train: bool) -> bool:
        """Returns whether packing is asked for, gives the results of the plain computation, and is faster."""
        c = self.config
        if not c.execution.packed or self.is_initializing() or sown.watched(self):
            return False
        binary = c.weight_bits == c.act_bits == 1 and c.sign.forward is jnp.sign and c.norm == "batch_norm"
        unrounded = x.dtype == c.dtype == accumulator_dtype(c.dtype)
        if not train:
            return binary and unrounded
        # The cost of the statistics does not depend on the number of tokens.
        pays = x.shape[0] * x.shape[1] >= self.mlp_dim
        return binary and unrounded and pays and c.rule is DENSE and not c.batch_norm_group

    def _packed(self, x: Array, train: bool) -> Array:
        """Computes the two units from the variables that they made in ``init``."""
        names, epsilon = ("expand", "contract"), self.config.norm_epsilon
        units = [packed_unit(self.variables["params"][name]) for name in names]
        running = [self.variables["batch_stats"][name]["norm"] for name in names]
        tokens = x.reshape(-1, x.shape[-1])
        if not train:
            moments = [packed_feed_forward.Moments(**norm) for norm in running]
            return packed_feed_forward.inference(tokens, units, moments, epsilon).reshape(x.shape)
        y, *moments = packed_feed_forward.feed_forward(tokens, *units, self.config.sign, epsilon)
        for name, norm, batch in zip(names, running, moments, strict=True):
            norm = advance_statistics(norm, batch.mean, batch.var, tokens.shape[0])
            self.put_variable("batch_stats", name, {"norm": norm})
        return y.reshape(x.shape)


def packed_unit(params: Mapping[str, Any]) -> packed_feed_forward.Unit:
    """Returns the parameters of a `BinaryUnit` for `bvit_jax.models.execution.packed_feed_forward`."""
    return packed_feed_forward.Unit(**params["dense"], **params["norm"], **params["rprelu"])


class BinaryBlock(nn.Module):
    """One encoder block: binary attention, binary feed-forward and pooling branches.

    Returns:
      Tokens (batch, tokens, channels) in the compute dtype, and the attention probabilities.
    """

    num_heads: int
    mlp_dim: int
    reduction: int
    drop_path: float | Array
    config: BlockConfig

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Attention]:
        c, variants = self.config, self.config.variants(train=train)
        width = x.shape[-1]
        normed = c.make_norm("attention_norm")(x, train=train)
        normed = normed.astype(c.dtype)
        attend = BinaryAttention(self.num_heads, self.reduction, c, name="attention")
        y, attention = attend(normed, train=train)
        y = BinaryUnit(width, c, name="attention_output")(y, y, train=train)
        x = variants.materialize(x + self._branch_end(y, "attention_scale", train=train))

        normed = c.make_norm("mlp_norm")(x, train=train).astype(c.dtype)
        y = BinaryFeedForward(self.mlp_dim, c, name="mlp")(normed, train=train)
        x = variants.materialize(x + self._branch_end(y, "mlp_scale", train=train))

        for size in sorted(c.pool_branches):
            for axis, direction in ((1, "h"), (2, "w")):
                pooled = variants.average_line(normed, size, axis)
                x = x + LayerScale(0.0, name=f"pool_{direction}{size}")(pooled)
        return x.astype(c.dtype), attention

    def _branch_end(self, y: Array, scale_name: str, *, train: bool) -> Array:
        c = self.config
        y = nn.Dropout(c.dropout)(y, deterministic=not train)
        if c.layer_scale:
            y = LayerScale(0.1, name=scale_name)(y)
        return DropPath(self.drop_path)(y, train=train)
