"""Where two models diverge: our layers against a golden file's trace, and the signs that rounding flips.

Layers have the names of PyTorch's modules. A layer is compared in float64, at the elements that the file
holds. Flips are the share of the signs entering a binary product that differ between float64 and a
narrower dtype.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from bvit_jax import models
from bvit_jax.binary.products import accumulator_dtype
from bvit_jax.errors import UserError
from bvit_jax.layers.activation import LayerScale, RPReLU
from bvit_jax.layers.dense import BinaryConv, BinaryDense, BinaryPatchConv, UncentredDense
from bvit_jax.layers.norm import BatchNorm
from bvit_jax.models.bivit.release import BinaryReduction
from bvit_jax.parity.golden import GoldenFile, compare
from bvit_jax.parity.subject import Subject, subject_of
from bvit_jax.weights.naming import Naming
from bvit_jax.weights.state_dicts import Variables, abstract_variables, from_state_dict

NARROW: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Per kind of layer, a parameter whose PyTorch name starts with that of the module.
_LAYERS: dict[type[nn.Module], str] = {
    BinaryDense: "kernel",
    BinaryPatchConv: "kernel",
    BinaryConv: "kernel",
    UncentredDense: "kernel",
    BinaryReduction: "kernel",
    nn.Dense: "kernel",
    nn.Conv: "kernel",
    BatchNorm: "scale",
    nn.LayerNorm: "scale",
    RPReLU: "move1",
    LayerScale: "alpha",
}
_ATTENDED = ("query", "key", "value")


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
      name: PyTorch's name.
      path: our path.
      error: error of its output in float64, relative to the largest magnitude in the trace.
      passed: whether the error is within the tolerance.
      flips: the share of flipped signs by ``torch float32``, ``float32`` and ``bfloat16``; empty if the
        layer takes no signs. For the RPReLU of queries, keys and values they are the signs of its shifted
        output in the attention product, for all others those of its shifted input.
    """

    name: str
    path: str
    error: float
    passed: bool
    flips: Mapping[str, float]


@dataclass
class _Trace:
    """What one run of our model computed, by PyTorch's names of the layers."""

    paths: dict[str, str]
    outputs: dict[str, np.ndarray]
    signs: dict[str, np.ndarray]


def layer_rows(path: Path) -> Iterator[LayerRow]:
    """Runs our model on a golden file and yields its layers in PyTorch's order of execution.

    Raises:
      UserError: the file cannot be read, has no trace, or holds a model that does not fit.
    """
    golden = GoldenFile(path)
    trace, torch_flips = golden.group("trace"), golden.group("flips")
    if not trace:
        raise UserError(
            "the file has no trace/* to compare layers with; write one with python -m bvit_jax.parity dump"
        )
    subject = subject_of(golden.meta)
    wide = _run(golden, subject, jnp.float64)
    flips = _flips(golden, subject, wide)
    for name in [*trace, *(n for n in wide.outputs if n not in trace)]:
        ours, theirs = ({name: t[name]} if name in t else {} for t in (wide.outputs, trace))
        row = compare(name, ours, theirs)
        shares = {"torch float32": float(torch_flips[name])} if name in torch_flips else {}
        shares |= {dtype: shares_of[name] for dtype, shares_of in flips.items() if name in shares_of}
        yield LayerRow(name, wide.paths.get(name, ""), row.error, row.passed, shares)


def flipped_signs(golden: GoldenFile) -> dict[str, dict[str, float]]:
    """Returns by the dtypes of `NARROW`, and by PyTorch's names of the layers, the share of flipped signs."""
    subject = subject_of(golden.meta)
    return _flips(golden, subject, _run(golden, subject, jnp.float64))


def _flips(golden: GoldenFile, subject: Subject, wide: _Trace) -> dict[str, dict[str, float]]:
    flips = {}
    for name, dtype in NARROW.items():
        narrow = _run(golden, subject, dtype).signs
        flips[name] = {layer: float(np.mean(signs != narrow[layer])) for layer, signs in wide.signs.items()}
    return flips


def _run(golden: GoldenFile, subject: Subject, dtype: Any) -> _Trace:
    config, naming = subject.config, subject.file_format.naming(subject.config)
    weights = np.float64 if dtype == jnp.float64 else np.float32
    sizes = tuple((name, array.size) for name, array in golden.group("trace").items())
    with jax.enable_x64(dtype == jnp.float64):
        model = models.create_model(config, dtype)
        state = golden.group("state") | golden.group("state2")
        variables = from_state_dict(state, abstract_variables(model, config.image_size), weights, naming)
        run, paths = _recording(model, naming, sizes, dtype)
        outputs, signs = jax.device_get(run(variables, golden.images().astype(weights)))
    return _Trace(paths, outputs, signs)


@functools.lru_cache(maxsize=8)  # files of the same model share its compiled programs
def _recording(
    model: nn.Module, naming: Naming, sizes: tuple[tuple[str, int], ...], dtype: Any
) -> tuple[Callable[..., Any], dict[str, str]]:
    """Returns the compiled forward pass with the outputs and signs of its layers, and their paths.

    The paths are known once it has run.
    """
    paths: dict[str, str] = {}

    def forward(variables: Variables, images: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        recorder = _Recorder(variables["params"], naming, dtype)
        with nn.intercept_methods(recorder):
            model.apply(variables, images)
        paths.update(recorder.paths())
        counts = dict(sizes)
        outputs = {name: _sample(array, counts.get(name)) for name, array in recorder.outputs().items()}
        return outputs, recorder.signs

    return jax.jit(forward), paths


class _Recorder:
    """Intercepts the method calls of linen modules and keeps what the layers compute.

    Layers that PyTorch has as one, such as queries, keys and values, have one name.
    """

    def __init__(self, params: Mapping[str, Any], naming: Naming, dtype: DTypeLike) -> None:
        self.params, self.naming, self.dtype = params, naming, dtype
        self.parts: dict[str, dict[str, Array]] = {}
        self.signs: dict[str, Array] = {}

    def __call__(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        module = context.module
        leaf = next((leaf for kind, leaf in _LAYERS.items() if isinstance(module, kind)), None)
        if leaf is None or context.method_name != "__call__":
            return output
        path = "/".join(module.path)
        name = self.naming.name(f"{path}/{leaf}").rpartition(".")[0]
        self.parts.setdefault(name, {})[path] = output
        shifted = self._shifted(module, args, output)
        if shifted is not None:
            self.signs[name] = jnp.sign(shifted).astype(jnp.int8)
        return output

    def paths(self) -> dict[str, str]:
        """Returns our path of each layer; of several that are one in PyTorch, the first."""
        return {name: next(iter(parts)) for name, parts in self.parts.items()}

    def outputs(self) -> dict[str, Array]:
        """Returns the output of each layer, with the channels of several one after the other."""
        return {name: _joined(parts) for name, parts in self.parts.items()}

    def _shifted(self, module: nn.Module, args: Any, output: Array) -> Array | None:
        """Returns the shifted activations whose signs enter a binary product at this layer, if any."""
        accumulator = accumulator_dtype(self.dtype)
        if isinstance(module, UncentredDense):
            return args[0]
        if isinstance(module, BinaryConv):
            return args[0].astype(accumulator) + args[1] if module.act_bits == 1 else None
        if isinstance(module, BinaryDense | BinaryPatchConv):
            return (
                args[0].astype(accumulator) + self._at(module.path)["move"] if module.act_bits == 1 else None
            )
        if isinstance(module, RPReLU) and module.path[-2] in _ATTENDED:
            attention = self._at(module.path[:-2])
            if {"prob_scale", "prob_act"} & {*attention}:  # else the attention product is real
                kept = output.astype(self.dtype).astype(accumulator)
                return kept + attention[f"{module.path[-2]}_move"]
        return None

    def _at(self, path: tuple[str, ...]) -> Any:
        return functools.reduce(operator.getitem, path, self.params)


def _joined(parts: Mapping[str, Array]) -> Array:
    if len(parts) == 1:
        return next(iter(parts.values()))
    order = sorted(parts, key=lambda path: [f"/{name}" in path for name in _ATTENDED], reverse=True)
    return jnp.concatenate([parts[path] for path in order], axis=-1)


def _sample(array: Array, count: int | None) -> Array:
    """Returns ``count`` evenly spaced elements: those that a golden file's trace holds."""
    flat = array.reshape(-1)
    count = min(count or 1, flat.size)
    return flat[np.arange(count) * flat.size // count]
