"""The registry of models, and from a configuration to a model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from bvit_jax.errors import UserError, nearest
from bvit_jax.models import bhvit, binaryvit, deit, react_deit, swin
from bvit_jax.models.bivit import paper, release
from bvit_jax.models.execution.stages import PLAIN, POLICIES, Execution
from bvit_jax.models.settings import Family

if TYPE_CHECKING:  # models also run where ml-collections is not installed
    from ml_collections import ConfigDict

MODELS: dict[str, Family] = {
    "bhvit": bhvit.FAMILY,
    "binaryvit": binaryvit.FAMILY,
    "bivit_deit": paper.DEIT_FAMILY,
    "bivit_release_deit": release.DEIT_FAMILY,
    "bivit_release_swin": release.SWIN_FAMILY,
    "bivit_swin": paper.SWIN_FAMILY,
    "deit": deit.FAMILY,
    "react_deit": react_deit.FAMILY,
    "swin": swin.FAMILY,
}
FORMER_NAMES = {"extra_res": "react_deit"}  # read everywhere, written nowhere


def current_name(name: Any) -> Any:
    """Returns the name under which a model is known today; others are returned as they are."""
    return FORMER_NAMES.get(name, name) if isinstance(name, str) else name


def family(name: str) -> Family:
    """Returns the family of a name of today or of former times.

    Raises:
      UserError: there is none.
    """
    known = MODELS.get(current_name(name)) if isinstance(name, str) else None
    if known is None:
        raise UserError(f"config.model.name is {name!r}" + nearest(str(name), MODELS))
    return known


def same_layers(name: str, other: str) -> bool:
    """Returns whether two models differ only in which layers are binary, so that they share weights."""
    return family(name).model is family(other).model


def model_config(name: str, **settings: Any) -> "ConfigDict":
    """Returns the complete configuration of a model, ``settings`` in place of its defaults.

    Raises:
      UserError: there is no such model or setting.
    """
    from ml_collections import ConfigDict

    return ConfigDict({"name": current_name(name), **_complete(name, settings)})


def _complete(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings of a model, the given ones in place of the defaults."""
    defaults = family(name).settings()
    for key in settings:
        if key not in defaults:
            raise UserError(f"config.model.{key} is not a setting of {name}" + nearest(key, defaults))
    return {**defaults, **settings}


def real_backbone(config: "Mapping[str, Any]") -> "ConfigDict | None":
    """Returns the complete configuration of the real-valued model of the same sizes, None if there is none.

    Args:
      config: complete configuration of a model.
    """
    name = family(config["name"]).backbone
    if not name:
        return None
    return model_config(name, **{key: config[key] for key in family(name).settings() if key in config})


def create_model(
    config: "Mapping[str, Any] | ConfigDict", dtype: DTypeLike = jnp.float32, execution: Execution = PLAIN
) -> nn.Module:
    """Returns the model that ``config`` describes, computing in ``dtype``.

    Args:
      config: ``name`` and any settings of the model, as `model_config` returns them.
      dtype: dtype of the activations; parameters are float32 whatever it is.
      execution: how it runs, which is no part of its description; ``packed`` means nothing to a model for
        which `packs_signs` is false.

    Raises:
      UserError: a setting is unknown or out of range, or sizes do not divide; the message names the
        key.
    """
    settings = {key: config[key] for key in config}
    name = settings.pop("name", None)
    settings = _complete(name, settings)
    model = family(name).build(settings, dtype, execution)
    _check_execution(name, settings, execution)
    return model


def _check_execution(name: str, settings: Mapping[str, Any], execution: Execution) -> None:
    able = packs_signs(name)
    policies = ("none", *(policy for policy in POLICIES if able or policy != "products"))
    if execution.remat not in policies:
        raise UserError(
            f"config.remat is {execution.remat!r}; of {name}, expected one of {', '.join(policies)}"
        )
    if execution.one_pass_norms and settings.get("norm") != "batch_norm":
        raise UserError(f"config.one_pass_norms is True: {name} has no batch norms; set it to False")


def packs_signs(name: str) -> bool:
    """Returns whether a model is made of the blocks that save integer products and pack signs into bits."""
    return family(name).block.packs_signs


def num_params(params: Any) -> int:
    """Returns the number of learned values in a parameter tree (arrays or their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
