"""How the blocks of a stage run: one after the other or in a scan, with or without rematerialisation.

None of it changes what a model is: variables, their names and what is computed stay the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from bvit_jax.binary import products
from bvit_jax.layers import closed_form
from bvit_jax.models.head import Attention

Remat = Literal["none", "block", "dots", "products"]

# What a block saves for its backward pass in addition to its input.
POLICIES: dict[Remat, Callable[..., bool]] = {
    "block": jax.checkpoint_policies.nothing_saveable,
    # The products with weights, which have no batch dimensions, and not those of attention: the latter
    # are the largest arrays of a block and the cheapest to compute again.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Integers of one or two bytes, and batch statistics: the rest is cheap to recompute.
    "products": jax.checkpoint_policies.save_only_these_names(products.PRODUCT, closed_form.STATISTICS),
}


@dataclass(frozen=True)
class Execution:
    """How a model runs, apart from what it is; `bvit_jax.models.choice` chooses it for a run.

    Attributes:
      remat: what a block saves for its backward pass, which recomputes the rest: "none" recomputes nothing,
        "block" saves only the input, "dots" also the products with weights, "products" those as integers and
        the statistics of batch norms.
      scan_blocks: whether the identical blocks of a stage are compiled once, as the body of a loop.
      one_pass_norms: whether batch norms take mean and variance in one pass, see
        `bvit_jax.layers.norm.BatchNorm`.
      packed: whether `bvit_jax.models.execution.packed_feed_forward` computes the feed-forward branches where
        it computes the same.
      images_at_once: in evaluation, how many images go through the model together; 0: the whole batch.
    """

    remat: Remat = "none"
    scan_blocks: bool = False
    one_pass_norms: bool = False
    packed: bool = False
    images_at_once: int = 0

    @property
    def integer_products(self) -> bool:
        """Whether products are saved as integers, and what is recomputed from them is arranged for it."""
        return self.remat == "products"

    def __str__(self) -> str:
        """Returns it in one line, as settings where there are such."""
        values = [f"{field.name}={getattr(self, field.name)}" for field in fields(self)]
        return ", ".join([*values, f"integer products {'on' if self.integer_products else 'off'}"])


PLAIN = Execution()


@dataclass(frozen=True)
class StageOutput:
    """What `run_blocks` returns; the lists are empty unless asked for.

    Attributes:
      tokens: what the last block returns, (batch, tokens, channels).
      hidden: what each block returns.
      attentions: the attention probabilities of each block, as used and before binarisation.
    """

    tokens: Array
    hidden: list[Array]
    attentions: list[Attention]


def run_blocks(
    module: nn.Module,
    blocks: Sequence[Any],
    x: Array,
    *,
    train: bool,
    capture: bool,
    execution: Execution,
    first_batch: bool = False,
) -> StageOutput:
    """Runs the blocks of a stage, as children of the model that calls it.

    In a scan the variables of the blocks are stacked inside the call, so that their tree stays that of
    the blocks. Where blocks differ regularly, as every second block of Swin does, the body of the scan is the
    shortest run of blocks that repeats; a remainder runs by itself. A scanned block draws its dropout from
    the key of the stage with its index folded in, others from the key with their path.

    Args:
      module: the model, inside its compact method.
      blocks: modules with a name and no parent, which differ in ``drop_path`` and, regularly, otherwise.
      x: (batch, tokens, channels) in the compute dtype.
      train: for the blocks.
      capture: whether hidden states and attentions are asked for.
      execution: how.
      first_batch: whether the blocks set values from this batch, which they can only do one after the other.
    """
    options = {"train": train}
    if first_batch:
        execution, options = PLAIN, {"train": train, "first_batch": True}
    scanned = 0 if module.is_initializing() or not execution.scan_blocks else _repeated(blocks)
    output = StageOutput(x, [], [])
    if scanned:
        output = _scan(module, blocks[:scanned], x, train, capture, execution.remat)
    x = output.tokens
    for block in blocks[scanned:]:
        block = block.clone(parent=module)
        if execution.remat == "none":
            x, attention = block(x, **options)
        else:
            x, attention = _recomputed(block, x, options, capture, execution.remat)
        if capture:
            output.hidden.append(x)
            output.attentions.append(attention)
    return StageOutput(x, output.hidden, output.attentions)


def _recomputed(block: Any, x: Array, options: dict[str, bool], capture: bool, remat: Remat) -> Any:
    def call(block: Any, x: Array) -> tuple[Array, Attention | None]:
        x, attention = block(x, **options)
        return x, attention if capture else None  # what is returned is also saved

    return nn.remat(call, policy=POLICIES[remat])(block, x)


def _repeated(blocks: Sequence[Any]) -> int:
    """Returns how many of the blocks, from the first on, a scan runs; 0 if nothing repeats."""
    period = _period(blocks)
    count = len(blocks) // period
    return period * count if count > 1 else 0


def _period(blocks: Sequence[Any]) -> int:
    """Returns the length of the shortest run of blocks that the sequence repeats."""
    kinds = [block.clone(parent=None, name=None, drop_path=0.0) for block in blocks]
    periods = range(1, len(kinds) + 1)
    return next(p for p in periods if all(a == b for a, b in zip(kinds, kinds[p:])))


def _scan(
    module: nn.Module, blocks: Sequence[Any], x: Array, train: bool, capture: bool, remat: Remat
) -> StageOutput:
    period = _period(blocks)
    drops = train and any(block.drop_path for block in blocks)
    updates = ["batch_stats"] if module.is_mutable_collection("batch_stats") else False
    key = module.make_rng("dropout") if train and module.has_rng("dropout") else None

    def apply(kind: Any, variables: Any, rate: Array, index: Array, x: Array) -> Any:
        block = kind.clone(parent=None, drop_path=rate if drops else 0.0)
        rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
        result: Any = block.apply(variables, x, train=train, mutable=updates, rngs=rngs)
        (x, attention), updated = result if updates else (result, {})
        return x, updated.get("batch_stats", {}), (x, attention) if capture else None

    if remat != "none":
        # Inside a loop nothing can be merged across the forward and the backward pass.
        apply = jax.checkpoint(apply, policy=POLICIES[remat], prevent_cse=False, static_argnums=0)

    def body(x: Array, group: Any) -> Any:
        outputs = []
        for kind, variables, rate, index in zip(blocks[:period], *group, strict=True):
            x, *output = apply(kind, variables, rate, index, x)
            outputs.append(output)
        return x, outputs

    grouped = jnp.arange(len(blocks)).reshape(-1, period)
    rates = jnp.array([block.drop_path for block in blocks], jnp.float32).reshape(-1, period)
    stacked = [_stacked(module, blocks[i::period]) for i in range(period)]
    x, outputs = jax.lax.scan(body, x, (stacked, list(rates.T), list(grouped.T)))

    hidden, attentions = [], []
    for i, block in enumerate(blocks):
        statistics, captured = jax.tree.map(lambda a, i=i: a[i // period], outputs[i % period])
        if updates and statistics:
            module.put_variable("batch_stats", block.name, statistics)
        if capture:
            hidden.append(captured[0])
            attentions.append(captured[1])
    return StageOutput(x, hidden, attentions)


def _stacked(module: nn.Module, blocks: Sequence[Any]) -> dict[str, Any]:
    """Returns the variables of identical blocks, each array stacked along a new first axis."""

    def stack(collection: str) -> Any:
        trees: list[Any] = [module.get_variable(collection, block.name, {}) for block in blocks]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)

    return {collection: stack(collection) for collection in ("params", "batch_stats")}
