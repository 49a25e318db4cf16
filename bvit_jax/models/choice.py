"""The one place that decides how the model of a run executes, from its configuration and its devices.

An explicit setting is always obeyed. "auto" is what measured best among the ways that do not change what is
computed, except for the order of sums; see docs/scaling.md and docs/topologies.md:

==============  ==================================  ============================  ===========
setting         one CPU                             TPUs                          elsewhere
==============  ==================================  ============================  ===========
remat           none                                products, where exact         none
scan_blocks     while training with packed signs    no                            no
                and without dropout
packed          yes                                 no                            no
==============  ==================================  ============================  ===========

On TPUs ``remat="products"`` is exact in float32; in bfloat16 it rounds more than "none", so that it has to be
asked for. Batch norms in one pass are never chosen: they change the numbers. The preset
``configs/binaryvit_small.py:tpu`` asks for all three.
"""

from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from bvit_jax.errors import UserError
from bvit_jax.models.execution.stages import Execution, Remat
from bvit_jax.models.factory import packs_signs

if TYPE_CHECKING:
    from ml_collections import ConfigDict

RATES = ("dropout", "attention_dropout", "drop_path")


def choose(config: "ConfigDict", mesh: Mesh, *, train: bool) -> Execution:
    """Returns how the model of a run executes.

    Args:
      config: of the run.
      mesh: its devices.
      train: whether to train, or to evaluate.

    Raises:
      UserError: packed signs are asked for on several devices.
    """
    packed = _packed(config, mesh)
    return Execution(
        remat=_remat(config, mesh, train),
        scan_blocks=_scans(config, packed, train),
        one_pass_norms=config.one_pass_norms,
        packed=packed,
        images_at_once=0 if train else images_at_once(mesh, packed),
    )


def images_at_once(mesh: Mesh, packed: bool) -> int:
    """Returns how many images a model evaluates together where that measured best, 0 for the whole batch.

    On one CPU a small group keeps its activations in the caches.
    """
    return (4 if packed else 2) if one_cpu(mesh) else 0


def one_cpu(mesh: Mesh) -> bool:
    """Returns whether the only device is a CPU, on which packing signs into bits measured best."""
    return mesh.size == 1 and platform(mesh) == "cpu"


def _packed(config: "ConfigDict", mesh: Mesh) -> bool:
    if config.packed == "on" and mesh.size > 1:
        raise UserError(
            f"config.packed is on, which is for one device, and there are {mesh.size}; set it to auto"
        )
    wanted = one_cpu(mesh) if config.packed == "auto" else config.packed == "on"
    return wanted and packs_signs(config.model.name)


def _remat(config: "ConfigDict", mesh: Mesh, train: bool) -> Remat:
    if config.remat != "auto":
        return config.remat
    model: Any = config.model
    one_bit = packs_signs(model.name) and model.weight_bits == model.act_bits == 1
    exact = one_bit and config.compute_dtype == "float32"
    return "products" if train and exact and platform(mesh) == "tpu" else "none"


def _scans(config: "ConfigDict", packed: bool, train: bool) -> bool:
    if config.scan_blocks != "auto":
        return config.scan_blocks
    # Scanning draws other dropout masks, so that it is not chosen where there is dropout.
    return packed and train and not any(config.model.get(rate) for rate in RATES)


def platform(mesh: Mesh) -> str:
    """Returns the platform of the devices of a mesh, such as "cpu"."""
    return mesh.devices.flat[0].platform
