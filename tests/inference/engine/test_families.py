"""The engine's logits against those of the plain path and of golden files, in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.inference import engine
from bvit_jax.inference.engine.compiled import best
from bvit_jax.inference.engine.levels import XLA, Operations
from bvit_jax.parity.golden import GoldenFile
from bvit_jax.parity.subject import subject_of
from bvit_jax.weights.state_dicts import abstract_variables, from_state_dict
from tests.tiny_models import images_for, smallest, spread_variables

pytestmark = pytest.mark.usefixtures("x64")

GOLDEN = (
    *("react_deit", "react_deit_avgpool", "react_deit_steps", "binaryvit", "binaryvit_some_fp"),
    *("bhvit_window3", "bivit_deit", "bivit_deit_nodist", "bivit_swin"),
)


def logits_of(config: Any, variables: Any, images: Any) -> list[np.ndarray]:
    """Returns the engine's logits, in float64, by XLA's operations and by compiled ones if there are any."""
    folded = engine.fold(config, variables, np.float64)

    def logits(level: Operations) -> np.ndarray:
        arrays = engine.prepared(config, folded, level)
        return np.asarray(jax.jit(lambda arrays, x: engine.apply(config, arrays, x, level))(arrays, images))

    return [logits(level) for level in {XLA, best()}]


def error(ours: list[np.ndarray], theirs: Any) -> float:
    return max(float(np.max(np.abs(one - theirs)) / np.max(np.abs(theirs))) for one in ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files(name: str, golden_file: Callable[[str], Path]) -> None:
    golden = GoldenFile(golden_file(name))
    subject = subject_of(golden.meta)
    config = subject.config
    model = models.create_model(config, jnp.float64)
    naming = subject.file_format.naming(config)
    abstract = abstract_variables(model, config.image_size)
    state = golden.group("state") | golden.group("init_state") | golden.group("state2")
    variables = from_state_dict(state, abstract, np.float64, naming)
    assert error(logits_of(config, variables, golden.images()), golden.array("eval/logits")) < 1e-12


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "binaryvit": ("binaryvit", {}),
    "some_fp": ("binaryvit", {"some_fp": True}),
    "layer_norm": ("binaryvit", {"norm": "layer_norm"}),
    "layer_norm, some_fp": ("binaryvit", {"norm": "layer_norm", "some_fp": True}),
    "one branch": ("binaryvit", {"pool_branches": (3,), "layer_scale": False}),
    "react_deit": ("react_deit", {}),
    "react_deit, floor": ("react_deit", {"prob_scale_floor": 0.3}),
    "bhvit": ("bhvit", {"window_size": 1, "shift_branches": (3,)}),
    "bhvit, gsb": ("bhvit", {"gsb": True, "recu": True, "some_fp": True, "layer_scale": False}),
    "bhvit, layer_norm": ("bhvit", {"norm": "layer_norm", "shift_branches": ()}),
    "bhvit, layer_norm, gsb": ("bhvit", {"norm": "layer_norm", "gsb": True}),
    "bivit_deit": ("bivit_deit", {}),
    "bivit_deit, no scale": ("bivit_deit", {"learned_scale": False, "distillation_head": False}),
    "bivit_release_deit": ("bivit_release_deit", {}),
    "bivit_swin": ("bivit_swin", {"depth": (2, 1), "num_heads": (2, 4)}),
    "bivit_release_swin": ("bivit_release_swin", {"depth": (2, 1), "num_heads": (2, 4)}),
    "class token": ("react_deit", {"class_token": True, "pool_branches": (), "norm": "layer_norm"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SETTINGS)
def test_the_plain_path(case: str) -> None:
    """Every switch, with weights at the mean of their row, whose code is 0, and a row of zeros."""
    name, settings = SETTINGS[case]
    model, config = smallest(name, jnp.float64, **settings)
    variables = with_zeros(spread_variables(model, config, np.float64))
    images = images_for(config, 2, np.float64)
    plain = jax.jit(model.apply)(variables, images).logits
    assert error(logits_of(config, variables, images), plain) < 1e-12


BINARY = ("dense", "conv", "conv1", "query", "mlp_in", "reduction")


def with_zeros(variables: Any) -> Any:
    """Returns variables with a symmetric row and one of zeros in each binary kernel."""

    def change(path: tuple, array: Any) -> Any:
        names = [key.key for key in path]
        if names[-1] == "zero_point":
            return 3 * array  # so that rounding them leaves some
        if names[-1] != "kernel" or names[-2] not in BINARY:
            return array
        row = np.zeros(array[..., 0].size)
        row[:2] = 1, -1
        return jnp.asarray(array).at[..., 0].set(row.reshape(array[..., 0].shape)).at[..., 1].set(0)

    return jax.tree_util.tree_map_with_path(change, variables)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("binaryvit", {"weight_bits": 4}, "have one bit can be packed; weight_bits 4"),
        ("binaryvit", {"act_bits": 32}, "act_bits 32"),
        ("deit", {}, "deit is real-valued"),
    ],
)
def test_what_is_not_of_one_bit(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine.fold(models.model_config(name, **settings), {})


def test_blocks_that_are_alike_are_compiled_once() -> None:
    """In a loop over their stacked arrays; not where one has a weight of zero and another has none."""
    model, config = smallest("binaryvit", jnp.float64, depth=(3, 1))
    variables = spread_variables(model, config, np.float64)
    arrays = engine.fold(config, variables, np.float64)
    stacked = engine.prepared(config, arrays, XLA)
    name = "mlp/expand/negative"
    assert stacked[f"block0-block2/{name}"].shape == (3, *arrays[f"block0/{name}"].shape)
    assert "block3/mlp/expand/negative" in stacked
    assert not any(name.startswith("block1/") for name in stacked)
    variables["params"]["block1"]["mlp"]["expand"]["dense"]["kernel"] *= 0
    arrays = engine.fold(config, variables, np.float64)
    assert engine.prepared(config, arrays, XLA).keys() == arrays.keys()
