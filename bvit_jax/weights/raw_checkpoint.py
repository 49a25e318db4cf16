"""Checkpoints as read, before any format has interpreted them: named arrays and what describes them."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bvit_jax.errors import UserError, nearest
from bvit_jax.weights import tensor_files
from bvit_jax.weights.document import KEY as DOCUMENT_KEY
from bvit_jax.weights.document import Document, find_document
from bvit_jax.weights.tensor_files import StateDict

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
OLD_WEIGHTS_FILE = "pytorch_model.bin"  # Hugging Face's, before safetensors
PROCESSOR_FILE = "preprocessor_config.json"  # Hugging Face's
WRAPPERS = ("_orig_mod.", "module.", "model.")  # prefixes of all names: compiled, parallel, Lightning
WEIGHTS_KEYS = ("model", "state_dict", "module")  # in training checkpoints that hold more than weights


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
    """Returns whether a file holds the weights of a directory that describes them."""
    names = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", OLD_WEIGHTS_FILE)
    return path.name in names and (path.parent / CONFIG_FILE).is_file()


def _read_directory(path: Path, values: Mapping[str, Any]) -> RawCheckpoint:
    if not (path / CONFIG_FILE).is_file() and not values:
        raise UserError(
            f"no {CONFIG_FILE} in {path}; expected a directory with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    values = values or _read_json(path / CONFIG_FILE)
    weights, index = path / WEIGHTS_FILE, path / f"{WEIGHTS_FILE}.index.json"
    if weights.is_file():
        state, _ = tensor_files.read_safetensors(weights)
        files = [weights]
    elif index.is_file():
        state, files = tensor_files.read_sharded(index)
    elif (path / OLD_WEIGHTS_FILE).is_file():
        files = [path / OLD_WEIGHTS_FILE]
        state = _state_dict(tensor_files.read_torch(files[0]), files[0])
    else:
        raise UserError(f"no {WEIGHTS_FILE} in {path}; expected it next to {CONFIG_FILE}")
    processor_file = path / PROCESSOR_FILE
    processor = _read_json(processor_file) if processor_file.is_file() else {}
    return _raw(state, values, tuple(files), processor=processor)


def _read_torch(
    path: Path, values: Mapping[str, Any], weights_key: str | None
) -> tuple[RawCheckpoint, tuple[str, ...]]:
    content = tensor_files.read_torch(path)
    if weights_key is not None and weights_key not in content:
        raise UserError(f"{path} has no entry {weights_key!r}" + nearest(weights_key, map(str, content)))
    key = weights_key or next((key for key in WEIGHTS_KEYS if isinstance(content.get(key), dict)), None)
    state = content if key is None else content[key]
    others = {} if key is None else {k: v for k, v in content.items() if k != key}
    state = _state_dict(state, path, key)
    described = _parse_description(path, others.pop(DOCUMENT_KEY, None))
    args = others.get("args", {})
    raw = _raw(state, values or described, (path,), args=args if isinstance(args, dict) else {})
    return raw, tuple(sorted(map(str, others)))


def _state_dict(content: Any, path: Path, key: str | None = None) -> StateDict:
    """Returns the content if it is a state dict; raises `UserError` otherwise."""
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not content or not all(isinstance(a, np.ndarray) for a in content.values()):
        where = "" if key is None else f" under {key!r}"
        raise UserError(f"{path} holds no state dict{where}; expected names and tensors")
    return content


def _raw(
    state: StateDict, values: Mapping[str, Any], files: tuple[Path, ...], **more: Mapping[str, Any]
) -> RawCheckpoint:
    for prefix in WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): a for name, a in state.items()}
    origin = str(files[0]) if len(files) == 1 else str(files[0].parent)
    document = find_document(values, origin)
    return RawCheckpoint(state, values, document=document, files=files, origin=origin, **more)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not values:
            raise ValueError("it is empty or not an object")
        return values
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; expected the JSON of a model") from error


def _parse_description(path: Path, text: Any) -> dict[str, Any]:
    """Returns the ``config.json`` embedded in a file; empty if there is none."""
    if text is None:
        return {}
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its description is damaged: {error}") from error
