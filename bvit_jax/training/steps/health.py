"""The health of a binary network, layer by layer: what its signs do, and what gets a gradient.

Kinds of figures, of every layer that has them:

======================  ===================================================================================
``flipped``             share of the signs of a binary kernel that differ from those at the last log
``active_weights``      share of the latent weights of a binary kernel that its quantiser gives a gradient
``active_inputs``       share of the inputs of a sign that its straight-through estimator gives a gradient
``zeros``               share of the inputs of a sign that are exactly zero; see `bvit_jax.layers.sown`
``level_0``             share of attention codes that are 0; as many kinds as there are levels
``dead_heads``          number of heads whose binarised attention probabilities are all zero over the batch
``nonpositive_scales``  number of learned scales of attention levels that are 0, negative or NaN
======================  ===================================================================================

The first two need the weights alone. The others come from a forward pass over the last training batch, or
its first microbatch, augmented and normalised as in the step, in training mode with the step's dropout;
statistics are not updated. Layers report through `bvit_jax.layers.sown` and `bvit_jax.layers.kernels`; a
model without binary layers has no figures, and the compiler removes the pass.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh

from bvit_jax.layers import sown
from bvit_jax.layers.kernels import Signs, active_weights, flipped, noted_kernels, pack_signs
from bvit_jax.training.steps.batch import Batch, Inputs
from bvit_jax.training.steps.state import TrainState

NUMBERS = ("dead_heads", "nonpositive_scales")  # all other kinds are shares
_LEVELS = tuple(f"level_{level}" for level in range(sown.LEVELS))
KINDS = ("flipped", "active_weights", "active_inputs", "zeros", *_LEVELS, *NUMBERS)

Layers = dict[str, dict[str, float]]


@struct.dataclass
class Figures:
    """The figures of all layers at one time.

    Attributes:
      values: float32 [n].
      names: kind and layer of each, such as ``("flipped", "block0/attention/query/dense")``.
    """

    values: Array
    names: tuple[tuple[str, str], ...] = struct.field(pytree_node=False)


def measure(
    model: nn.Module,
    inputs: Inputs,
    accumulate_steps: int,
    mesh: Mesh | None,
    state: TrainState,
    batch: Batch,
    key: Array,
) -> tuple[Figures, Signs]:
    """Returns the figures of a state, and the signs of its weights.

    The signs take the place of ``state.signs``, so that flips are counted from here on.

    Args:
      model: the student, not scanned: layers in a scan cannot report.
      inputs: of the training step.
      accumulate_steps: microbatches of a step, of which the pass sees the first.
      mesh: needed where arrays are sharded.
      state: returned by the step over ``batch``.
      batch: ``image``, uint8 [B, H, W, 3], and ``label``, int32 [B].
      key: of training.
    """
    images, dropout_key = inputs.first_images(batch, key, state.step - 1, accumulate_steps, mesh)
    with noted_kernels() as kernels:
        _, updates = model.apply(
            state.variables,
            images,
            train=True,
            mutable=["batch_stats", sown.COLLECTION],
            rngs={"dropout": dropout_key},
        )
    figures = {
        ("flipped", layer): share for layer, share in flipped(state.signs, state.params, kernels).items()
    }
    for layer, share in active_weights(state.params, kernels).items():
        figures["active_weights", layer] = share
    for path, value in flatten_dict(updates.get(sown.COLLECTION, {})).items():
        *layer_path, kind, part = path
        figures[kind, "/".join([*layer_path, part] if part else layer_path)] = value
    values = jnp.array(list(figures.values()), jnp.float32)
    return Figures(values, tuple(figures)), pack_signs(state.params, kernels)


def per_layer(figures: Figures) -> Layers:
    """Returns ``{kind: {layer: value}}`` once the device has computed it."""
    layers: Layers = {}
    for (kind, layer), value in zip(figures.names, jax.device_get(figures.values).tolist(), strict=True):
        layers.setdefault(kind, {})[layer] = value
    return layers


def totals(layers: Layers) -> dict[str, float]:
    """Returns one number for each kind: the mean over its layers, and the sum of `NUMBERS`.

    Layers weigh the same, whatever their size: most activations are in the first stage of a pyramid
    and most weights in the last, which would hide what happens in all others.
    """
    found = {kind: layers[kind].values() for kind in KINDS if kind in layers}
    return {
        kind: round(sum(values)) if kind in NUMBERS else sum(values) / len(values)
        for kind, values in found.items()
    }


def layers_due(step: int, log_every_steps: int, steps_per_epoch: int) -> bool:
    """Returns whether an epoch has ended since the log before: then the figures of all layers are written.

    BinaryViT has 629 of them, 24 kB a line, and many logs in an epoch of ImageNet.
    """
    before = (step - 1) // log_every_steps * log_every_steps
    return step // steps_per_epoch > before // steps_per_epoch
