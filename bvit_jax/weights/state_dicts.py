"""Our variables as PyTorch state dicts and back, in any of the namings of `bvit_jax.weights.naming`."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from bvit_jax.errors import UserError
from bvit_jax.weights.naming import REFERENCE, Naming, from_torch_layout, path_name, to_torch_layout

Variables = dict[str, Any]
StateDict = dict[str, np.ndarray]

LISTED = 5  # names of each kind that a message lists
COMPARED = 100_000  # pairs of missing and unexpected names, in half a second
_STACK_ORDER = ("query", "key", "value")  # of arrays stacked under one name


class StateDictError(UserError):
    """A state dict does not fit a model.

    Attributes:
      problems: one line per array that is missing, unexpected or of another shape.
    """

    def __init__(self, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
        self.problems = [
            *(f"missing: {problem}" for problem in missing),
            *(f"unexpected: {problem}" for problem in unexpected),
            *(f"other shape: {problem}" for problem in misshapen),
        ]
        kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
        parts = [f"{len(names)} {kind} ({_listed(names)})" for kind, names in kinds.items() if names]
        super().__init__(f"arrays that do not fit the model: {'; '.join(parts)}")


def abstract_variables(model: nn.Module, image_size: int) -> Variables:
    """Returns the shapes and dtypes of a model's variables, without computing anything."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def to_state_dict(variables: Mapping[str, Any], naming: Naming = REFERENCE) -> StateDict:
    """Returns every array of ``params`` and ``batch_stats`` under its PyTorch name and layout.

    Raises:
      UserError: arrays that the naming stacks have different dtypes.
    """
    state = {}
    for name, paths in _names(variables, naming).items():
        arrays = [to_torch_layout(path, np.asarray(array)) for path, array in paths.items()]
        if len({array.dtype for array in arrays}) > 1:
            kinds = ", ".join(str(array.dtype) for array in arrays)
            raise UserError(f"{name} would stack arrays of different dtypes, {kinds}; use another format")
        state[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return state


def from_state_dict(
    state: Mapping[str, np.ndarray],
    abstract: Variables,
    dtype: DTypeLike | None = np.float32,
    naming: Naming = REFERENCE,
) -> Variables:
    """Returns the variables that a PyTorch-named state dict holds; bookkeeping arrays are left out.

    Args:
      state: arrays in PyTorch's names and layouts.
      abstract: the variables expected, from `abstract_variables`.
      dtype: dtype of the result; None keeps that of each array.
      naming: the names of ``state``.

    Raises:
      StateDictError: arrays are missing, unexpected, of another shape, or not floating-point numbers.
    """
    arrays = {name: np.asarray(a) for name, a in state.items() if not naming.is_bookkeeping(name)}
    names = _names(abstract, naming)
    check_fit(arrays, {name: _shape(paths) for name, paths in names.items()})
    found: dict[str, np.ndarray] = {}
    for name, paths in names.items():
        whole = arrays[name]
        parts = [whole] if len(paths) == 1 else np.split(whole, len(paths))
        for path, part in zip(paths, parts, strict=True):
            found[path] = np.array(from_torch_layout(path, part), dtype or whole.dtype, order="C")
    return {
        collection: jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], tree)
        for collection, tree in abstract.items()
    }


def _names(variables: Mapping[str, Any], naming: Naming) -> dict[str, dict[str, Any]]:
    """Returns, for each name of a state dict, the paths and arrays stored under it."""
    names: dict[str, dict[str, Any]] = {}
    for collection in ("params", "batch_stats"):
        for key_path, array in jax.tree_util.tree_leaves_with_path(variables.get(collection, {})):
            path = path_name(key_path)
            names.setdefault(naming.name(path), {})[path] = array
    return {name: dict(sorted(paths.items(), key=_stack_order)) for name, paths in names.items()}


def _stack_order(item: tuple[str, Any]) -> int:
    return next((i for i, part in enumerate(_STACK_ORDER) if f"/{part}/" in item[0]), 0)


def check_fit(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `StateDictError` unless the arrays are floating-point numbers of exactly these shapes."""
    missing, unexpected = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
    misshapen = []
    for name in sorted(shapes.keys() & arrays.keys()):
        array, expected = arrays[name], shapes[name]
        if array.shape != expected:
            misshapen.append(f"{name} is {array.shape}, expected {expected}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            misshapen.append(f"{name} holds {array.dtype}, expected floating-point numbers")
    if missing or unexpected or misshapen:
        # With more of them it is a file of another model.
        similar = len(missing) * len(unexpected) <= COMPARED
        raise StateDictError(
            [name + _nearest(name, unexpected if similar else []) for name in missing],
            [name + _nearest(name, missing if similar else []) for name in unexpected],
            misshapen,
        )


def _shape(paths: dict[str, Any]) -> tuple[int, ...]:
    """Returns the shape of what is stored under one name."""
    (path, leaf), *_ = paths.items()
    shape = to_torch_layout(path, np.empty(leaf.shape, np.bool_)).shape
    return shape if len(paths) == 1 else (len(paths) * shape[0], *shape[1:])


def _nearest(name: str, others: list[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    return f", nearest {close[0]}" if close else ""


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
