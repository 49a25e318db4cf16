"""Checkpoints as read, before any format has interpreted them: named arrays and what describes them."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bvit_jax.errors import UserError, nearest
from bvit_jax.files import parse_json, read_json
from bvit_jax.weights import tensor_files
from bvit_jax.weights.document import KEY as DOCUMENT_KEY
from bvit_jax.weights.document import Document, find_document
from bvit_jax.weights.packed import is_packed
from bvit_jax.weights.tensor_files import StateDict

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
OLD_WEIGHTS_FILE = "pytorch_model.bin"  # Hugging Face's and Accelerate's, before safetensors
ACCELERATE_FILE = "random_states_0.pkl"  # next to the weights that its save_state writes; never read
INDEX_SUFFIX = ".index.json"  # of the file that lists the shards
PROCESSOR_FILE = "preprocessor_config.json"  # Hugging Face's
# Prefixes of all names, in any order: compiled, parallel, Fabric's, and attributes of a Lightning module.
WRAPPERS = ("_orig_mod.", "module.", "_forward_module.", "model.", "net.", "network.", "student.")
WEIGHTS_KEYS = ("model", "state_dict", "module", "model_state_dict")  # in files that hold more than weights
MAX_CONFIG = 1 << 23  # characters of a config.json, which as Python's objects take twenty times as much
LISTED = 8  # entries that a message names


@dataclass(frozen=True)
class RawCheckpoint:
    """What the files contain.

    Attributes:
      state: the arrays by their names in the files.
      values: a configuration in the format's own terms, such as its ``config.json``; empty if none.
      args: the arguments of the training script; empty if unknown.
      processor: Hugging Face's ``preprocessor_config.json``; empty if none.
      document: what this project wrote about the model; None in other people's files.
      files: the files that hold the arrays.
      origin: what messages call it.
    """

    state: Mapping[str, np.ndarray]
    values: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    document: Document | None = None
    files: tuple[Path, ...] = ()
    origin: str = ""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an array; raises `UserError` if there is no array of that name."""
        if name not in self.state:
            raise UserError(f"{self.origin} has no array {name!r}{_close_to(name, self.state)}")
        return self.state[name].shape

    def count(self, before: str) -> int:
        """Returns how many numbered parts there are: one more than the highest number after ``before``."""
        pattern = re.compile(re.escape(before) + r"(\d+)\.")
        numbers = [int(match[1]) for name in self.state if (match := pattern.match(name))]
        return max(numbers, default=-1) + 1


def _close_to(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"; the nearest is {close[0]!r}" if close else ""


def read_raw(
    path: Path, config_file: Path | None = None, weights_key: str | None = None
) -> tuple[RawCheckpoint, tuple[str, ...]]:
    """Returns what a directory or file holds, and the names of its entries that are not weights.

    Args:
      path: a directory with ``config.json``, or a ``.safetensors`` or ``.pth`` file.
      config_file: a ``config.json`` to use instead of the one found there.
      weights_key: the entry of a ``.pth`` that holds the weights.

    Raises:
      UserError: a file is missing, damaged or malicious, or holds no named arrays.
    """
    values = {} if config_file is None else _read_json(config_file)
    if weights_key is not None and path.suffix not in tensor_files.TORCH_SUFFIXES:
        raise UserError(f"{path} is not a .pth file; leave out --key, which chooses an entry of one")
    if is_packed(path):
        raise UserError(
            f"{path} is a packed model, whose latent weights are gone: it can be run and not converted; take"
            " the model that it was exported from"
        )
    if path.is_dir():
        return _read_directory(path, values), ()
    if not path.exists():
        raise UserError(f"no file or directory {path}; expected a checkpoint")
    if _is_part_of_directory(path):
        return _read_directory(path.parent, values), ()
    if path.suffix == tensor_files.SAFETENSORS_SUFFIX:
        state, metadata = tensor_files.read_safetensors(path)
        described = _parse_description(path, metadata.get(DOCUMENT_KEY))
        return _raw(state, values or described, (path,)), ()
    if path.suffix in tensor_files.TORCH_SUFFIXES:
        return _read_torch(path, values, weights_key)
    raise UserError(
        f"{path} is of an unknown kind; expected a directory, {tensor_files.SAFETENSORS_SUFFIX} or"
        f" {', '.join(tensor_files.TORCH_SUFFIXES)}"
    )


def _is_part_of_directory(path: Path) -> bool:
    """Returns whether a file holds the weights, or a part, of a directory that describes them."""
    name = re.sub(r"-\d+-of-\d+(?=\.)", "", path.name).removesuffix(INDEX_SUFFIX)
    described = (path.parent / CONFIG_FILE).is_file() or name != path.name
    return name in (WEIGHTS_FILE, OLD_WEIGHTS_FILE) and described


def _read_directory(path: Path, values: Mapping[str, Any]) -> RawCheckpoint:
    """Returns what a directory holds; that of Accelerate's ``save_state``, without a description, as bare."""
    described = (path / CONFIG_FILE).is_file()
    if not (described or values or (path / ACCELERATE_FILE).is_file()):
        raise UserError(
            f"no {CONFIG_FILE} in {path}; expected a directory with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    if described and not values:
        values = _read_json(path / CONFIG_FILE)
    kinds: dict[str, Callable[[Path], StateDict]] = {
        WEIGHTS_FILE: lambda file: tensor_files.read_safetensors(file)[0],
        OLD_WEIGHTS_FILE: lambda file: _state_dict(tensor_files.read_torch(file), file),
    }
    for name, read in kinds.items():
        index = path / f"{name}{INDEX_SUFFIX}"
        if (path / name).is_file():
            state, files = read(path / name), [path / name]
        elif index.is_file():
            state, files = tensor_files.read_sharded(index, read)
        else:
            continue
        processor_file = path / PROCESSOR_FILE
        processor = _read_json(processor_file) if processor_file.is_file() else {}
        return _raw(state, values, tuple(files), processor=processor)
    raise UserError(
        f"no {WEIGHTS_FILE} in {path}, nor {OLD_WEIGHTS_FILE}, nor the {INDEX_SUFFIX} of shards; expected one"
        f" next to {CONFIG_FILE}"
    )


def _read_torch(
    path: Path, values: Mapping[str, Any], weights_key: str | None
) -> tuple[RawCheckpoint, tuple[str, ...]]:
    content = tensor_files.read_torch(path)
    if weights_key is not None and weights_key not in content:
        raise UserError(f"{path} has no entry {weights_key!r}" + nearest(weights_key, map(str, content)))
    key = weights_key or next((key for key in WEIGHTS_KEYS if isinstance(content.get(key), dict)), None)
    state = content if key is None else content[key]
    others = {} if key is None else {k: v for k, v in content.items() if k != key}
    if key is None and not _is_state_dict(state):
        entries = ", ".join(map(str, list(content)[:LISTED])) + (", ..." if len(content) > LISTED else "")
        raise UserError(
            f"{path} holds no state dict, but {entries or 'nothing'}; name that of the weights with --key"
        )
    state = _state_dict(state, path, key)
    described = _parse_description(path, others.pop(DOCUMENT_KEY, None))
    args = others.get("args", {})
    raw = _raw(state, values or described, (path,), args=args if isinstance(args, dict) else {})
    return raw, tuple(sorted(map(str, others)))


def _state_dict(content: Any, path: Path, key: str | None = None) -> StateDict:
    """Returns the content if it is a state dict; raises `UserError` otherwise."""
    if not _is_state_dict(content):
        where = "" if key is None else f" under {key!r}"
        raise UserError(f"{path} holds no state dict{where}; expected names and tensors")
    return content


def _is_state_dict(content: Any) -> bool:
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    return bool(named and content) and all(isinstance(a, np.ndarray) for a in content.values())


def unwrapped(
    state: Mapping[str, np.ndarray], ignored: Sequence[str]
) -> tuple[Mapping[str, np.ndarray], list[str]]:
    """Returns the arrays without prefixes that all names share, and the names that patterns leave out.

    Patterns may have the names with the prefixes or without them.
    """
    skipped = {name for pattern in ignored for name in fnmatch.filter(state, pattern)}
    state = {name: array for name, array in state.items() if name not in skipped}
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            inner = {name.removeprefix(prefix): array for name, array in state.items()}
            state, more = unwrapped(inner, ignored)
            return state, sorted(skipped.union(more))
    return state, sorted(skipped)


def _raw(
    state: StateDict, values: Mapping[str, Any], files: tuple[Path, ...], **more: Mapping[str, Any]
) -> RawCheckpoint:
    origin = str(files[0]) if len(files) == 1 else str(files[0].parent)
    document = find_document(values, origin)
    return RawCheckpoint(state, values, document=document, files=files, origin=origin, **more)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path, MAX_CONFIG)
        if not isinstance(values, dict) or not values:
            raise ValueError("it is empty or not an object")
        return values
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; expected the JSON of a model") from error


def _parse_description(path: Path, text: Any) -> dict[str, Any]:
    """Returns the ``config.json`` embedded in a file; empty if there is none."""
    if text is None:
        return {}
    try:
        if len(text) > MAX_CONFIG:
            raise ValueError(f"it has {len(text):,} characters; expected at most {MAX_CONFIG:,}")
        return dict(parse_json(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its description is damaged: {error}") from error
