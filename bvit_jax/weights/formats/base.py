"""What all file formats share: their description, and what is known once one has interpreted a file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bvit_jax.errors import UserError
from bvit_jax.models import same_layers
from bvit_jax.models.swin import MERGE, stage_window
from bvit_jax.models.windows import relative_positions, shift_mask
from bvit_jax.weights.naming import Naming
from bvit_jax.weights.preprocessing import Preprocessing
from bvit_jax.weights.raw_checkpoint import RawCheckpoint

ASSUMED_PREPROCESSING = "preprocessing as for DeiT (256 to 224 pixels, bicubic, ImageNet's colours)"

Config = Mapping[str, Any]  # of a model
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Interpretation:
    """The model that a raw checkpoint holds.

    Attributes:
      model: our name of it.
      settings: the settings that the files determine, or that are assumed.
      preprocessing: from an image file to its input.
      class_names: empty if the files do not name the classes.
      assumed: the settings that the files do not determine, in words.
    """

    model: str
    settings: dict[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One family of PyTorch files.

    Attributes:
      name: what users call it.
      models: the names of our models that it can hold.
      check: raises `UserError` if it cannot hold the model of a configuration after all.
      naming: from a model's configuration to the names of its arrays.
      recognise: whether files have this format.
      interpret: from files to a model.
      describe: from (configuration, class names, preprocessing) to the ``config.json``.
      writes_constants: whether PyTorch's modules own the `constants` today, so that a new file needs them.
      own_constants: from a configuration and the arrays of a state dict to its `constants`, without those of
        a Swin's windows.
      check_raw: raises `UserError` if the final configuration contradicts the files.
      processor: from the preprocessing to a ``preprocessor_config.json``; None if the format has none.
    """

    name: str
    models: tuple[str, ...]
    check: Callable[[Config], None]
    naming: Callable[[Config], Naming]
    recognise: Callable[[RawCheckpoint], bool]
    interpret: Callable[[RawCheckpoint], Interpretation]
    describe: Callable[[Config, tuple[str, ...], Preprocessing], dict[str, Any]]
    writes_constants: bool = False
    own_constants: Callable[[Config, Mapping[str, np.ndarray]], Arrays] = lambda config, state: {}
    check_raw: Callable[[Config, RawCheckpoint], None] = lambda config, raw: None
    processor: Callable[[Preprocessing], dict[str, Any]] | None = None

    def constants(self, config: Config, state: Mapping[str, np.ndarray]) -> Arrays:
        """Returns the arrays that do not affect the function, with the values they must have.

        Counters, and arrays that the naming calls unused, may have any value.

        Args:
          config: of the model.
          state: its state dict.
        """
        return self.own_constants(config, state) | _window_constants(config, self.naming(config))


def square_side(tokens: int, origin: str) -> int:
    """Returns the side of a square grid of tokens; raises `UserError` if it is not square."""
    side = round(max(tokens, 0) ** 0.5)
    if side * side != tokens or side == 0:
        raise UserError(f"{origin} has position embeddings of {tokens} patches, which form no square grid")
    return side


def check_epsilon(who: str, epsilon: float, config: Mapping[str, Any]) -> None:
    """Raises `UserError` if a model's epsilon is not the one that other code computes with."""
    if config["norm_epsilon"] != epsilon:
        raise UserError(
            f"norm_epsilon is {config['norm_epsilon']}, and {who} computes with {epsilon} whatever its files"
            f" say; use another format, or accept the difference with norm_epsilon={epsilon}"
        )


def _window_constants(config: Config, naming: Naming) -> Arrays:
    """Returns the constants of PyTorch's Swin modules: relative positions and masks; empty for others."""
    if not same_layers(config["name"], "swin"):
        return {}
    arrays: Arrays = {}
    side = config["image_size"] // config["patch_size"]
    for stage, depth in enumerate(config["depth"]):
        for i in range(depth):
            window = stage_window(side, config["window_size"], shifted=i % 2 == 1)
            table = naming.name(f"stage{stage}_block{i}/position_bias")
            index = table.replace("relative_position_bias_table", "relative_position_index")
            arrays[index] = relative_positions(window.size)
            if window.shift:
                block = naming.name(f"stage{stage}_block{i}/mlp_norm/scale").rsplit(".", 2)[0]
                arrays[f"{block}.attn_mask"] = shift_mask(window)
        side //= MERGE
    return arrays
