"""What a setting of a model is, and the checks that families share.

Settings are the fields of a model and of the configuration of its blocks whose defaults are numbers, flags,
names or tuples of numbers. The checks raise `UserError` with a message that names the key.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jax.typing import DTypeLike

from bvit_jax.errors import UserError, nearest
from bvit_jax.models.execution.stages import Execution

MAX_SIZE = 1 << 24  # of anything: a larger value is damage
KINDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a name",
    tuple: "a tuple of whole numbers",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What `bvit_jax.models.create_model` builds under one name.

    Attributes:
      model: the class of a module with ``validate()``, which raises `UserError` if settings do not fit.
      block: what its blocks have in common by default, a dataclass with ``dtype``, ``execution`` and
        ``validate()``.
      fields: values of the module's fields that replace their defaults.
      backbone: the name of the real-valued model with the same layers, "" if there is none.
    """

    model: Callable[..., nn.Module]
    block: Any
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    backbone: str = ""

    def settings(self) -> dict[str, Any]:
        """Returns the settings and their defaults."""
        own = {field.name: field.default for field in dataclasses.fields(self.model)}  # type: ignore[arg-type]
        values = own | dict(self.fields) | vars(self.block)
        return {key: value for key, value in values.items() if type(value) in KINDS}

    def build(self, settings: Mapping[str, Any], dtype: DTypeLike, execution: Execution) -> nn.Module:
        """Returns the module with all of its settings given.

        Raises:
          UserError: a value is of another kind than its default, or out of range.
        """
        for key, default in self.settings().items():
            require(_is_like(settings[key], default), key, settings[key], f"expected {KINDS[type(default)]}")
        shared = {key: value for key, value in settings.items() if key in vars(self.block)}
        own = {key: value for key, value in settings.items() if key not in shared}
        block = dataclasses.replace(self.block, **shared, dtype=dtype, execution=execution)
        model: Any = self.model(**{**self.fields, **own}, block=block)
        model.validate()
        block.validate()
        return model


def _is_like(value: Any, default: Any) -> bool:
    """Returns whether a value is of the kind of a setting's default."""
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and all(_is_like(item, 0) for item in value)
    return type(value) is type(default) and (not isinstance(default, int) or abs(value) < MAX_SIZE)


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raises `UserError` unless ``condition`` holds."""
    if not condition:
        raise UserError(f"config.model.{key} is {value!r}: {expected}")


def require_known(key: str, value: str, known: Iterable[str]) -> None:
    """Requires one of some names; the message has the nearest one."""
    if value not in known:
        raise UserError(f"config.model.{key} is {value!r}" + nearest(value, known))


def require_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Requires one of some values."""
    require(value in choices, key, value, "expected one of " + ", ".join(map(str, choices)))


def require_positive(settings: Any, *keys: str) -> None:
    """Requires attributes of ``settings`` to be above 0."""
    for key in keys:
        value = getattr(settings, key)
        require(value > 0, key, value, "expected a positive whole number")


def require_rates(settings: Any, *keys: str) -> None:
    """Requires attributes of ``settings`` to be rates of dropout."""
    for key in keys:
        value = getattr(settings, key)
        require(0 <= value < 1, key, value, "expected a rate from 0 to below 1")


def require_one_stage(settings: Any) -> None:
    """Requires the sizes of a model of one stage to be positive and to divide."""
    require_positive(settings, "width", "depth", "num_heads", "mlp_dim")
    require_grid(settings.image_size, settings.patch_size)
    require_heads(settings.width, settings.num_heads)
    require_rates(settings, "drop_path")
    require_classes(settings.num_classes)


def require_stages(settings: Any, first: str, *others: str) -> int:
    """Requires attributes of ``settings`` to have one positive value per stage; returns how many stages."""
    stages = len(getattr(settings, first))
    require(stages > 0, first, getattr(settings, first), f"expected one {first} per stage")
    for key in (first, *others):
        values = getattr(settings, key)
        require(
            len(values) == stages and all(value > 0 for value in values),
            key,
            values,
            f"expected {stages} positive whole numbers, one per stage as in config.model.{first}",
        )
    return stages


def require_grid(image_size: int, patch_size: int) -> int:
    """Requires patches to divide images; returns the number of tokens along a side of the grid."""
    require(patch_size > 0, "patch_size", patch_size, "expected a positive whole number")
    require(
        image_size > 0 and image_size % patch_size == 0,
        "image_size",
        image_size,
        f"expected a multiple of config.model.patch_size = {patch_size}",
    )
    return image_size // patch_size


def require_heads(width: int, num_heads: int, key: str = "width") -> None:
    """Requires heads to divide the channels."""
    require(width % num_heads == 0, key, width, f"expected a multiple of its {num_heads} heads")


def require_expansion(mlp_dim: int, width: int, key: str = "mlp_dim") -> None:
    """Requires the channels to divide the hidden channels of a feed-forward branch."""
    require(mlp_dim % width == 0, key, mlp_dim, f"expected a multiple of the width {width}")


def require_classes(num_classes: int) -> None:
    """Requires at least one class."""
    require(num_classes > 0, "num_classes", num_classes, "expected at least 1")


def require_epsilon(norm_epsilon: float) -> None:
    """Requires the epsilon of a norm to be a small positive number."""
    require(0 < norm_epsilon < 1, "norm_epsilon", norm_epsilon, "expected between 0 and 1")
