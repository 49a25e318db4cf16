"""Files of named arrays: safetensors, possibly sharded, and PyTorch's ``.pth``.

Reading never runs code from a file: safetensors holds none, and a ``.pth`` is read by
``torch.load(weights_only=True)``, which is allowed a few harmless classes more: the `argparse.Namespace` in
which training scripts store their arguments, and what stands for numpy's scalars, ``defaultdict`` and
Lightning's ``AttributeDict``. A file cannot claim more than it holds, see `MAX_VALUES` and what follows.
"""

import argparse
import hashlib
import pickletools
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bvit_jax.errors import UserError
from bvit_jax.files import read_json
from bvit_jax.weights.pickles import check_torch, first_line

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
SAFETENSORS_SUFFIX = ".safetensors"
MAX_VALUES = 1_000_000  # tensors, dicts and lists in a .pth
MAX_DEPTH = 100  # of lists in lists
MAX_EXPANSION = 4  # bytes of all tensors per byte of the file: some share their storage
SMALL = 1 << 26  # bytes of tensors that any file may hold

StateDict = dict[str, np.ndarray]


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file; raises `UserError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


# --- safetensors -------------------------------------------------------------------------------


def read_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    """Returns the arrays of a file, in the dtypes they are stored in, and its metadata.

    Raises:
      UserError: the file is missing, damaged, or not a safetensors file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return state, dict(file.metadata() or {})
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; is the file complete?") from error


def read_sharded(
    index: Path, read: Callable[[Path], StateDict] = lambda file: read_safetensors(file)[0]
) -> tuple[StateDict, list[Path]]:
    """Returns the arrays of the files that a ``model.safetensors.index.json`` lists, and those files.

    Args:
      index: that file, or the like for ``.bin``.
      read: returns the arrays of one shard.

    Raises:
      UserError: the index or a file is missing or damaged, or they contradict each other.
    """
    try:
        weight_map = dict(read_json(index)["weight_map"])
        files = sorted(set(weight_map.values()))
        if not files:
            raise ValueError("it lists no shards")
        if any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise ValueError("it names files outside its directory")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {index}: {error!r}; expected an index of shards") from error
    state: StateDict = {}
    for name in files:
        for key, array in read(index.parent / name).items():
            if weight_map.get(key) != name:
                raise UserError(f"{index.parent / name} holds {key!r}, which {index.name} does not list")
            state[key] = array
    if absent := sorted(weight_map.keys() - state.keys()):
        raise UserError(f"{index} lists {len(absent)} arrays that no shard holds, the first is {absent[0]}")
    return state, [index.parent / name for name in files]


def encode_safetensors(state: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns the content of a safetensors file."""
    contiguous = {name: np.array(array, order="C") for name, array in state.items()}
    return save(contiguous, metadata=dict(metadata))


# --- PyTorch -----------------------------------------------------------------------------------


def read_torch(path: Path) -> dict[str, Any]:
    """Returns what a ``.pth`` file holds, with tensors as numpy arrays and namespaces as dicts.

    Raises:
      UserError: torch is not installed; the file is missing, damaged, wants to run code, or holds
        something other than a dict.
    """
    torch = _import_torch()
    if not path.is_file():
        raise UserError(f"no file {path}; expected a checkpoint")
    check_torch(path)
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; real problems raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        content = _Content(MAX_EXPANSION * path.stat().st_size + SMALL).to_numpy(loaded)
    except Exception as error:  # pickle, zip and torch each raise their own
        raise UserError(f"cannot read {path}: {_unpickling_reason(path, error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of a checkpoint")
    return content


def write_torch(path: Path, content: dict[str, Any]) -> None:
    """Writes a dict, its numpy arrays as tensors; raises `UserError` if torch is not installed."""
    torch = _import_torch()
    torch.save(_to_torch(content), path)


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            "a .pth file needs PyTorch, which is not installed; install it (pip install torch) or use"
            " safetensors"
        ) from None
    return torch


def _unpickling_reason(path: Path, error: Exception) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign := named[1] if named else _class_in_bare_pickle(path):
        return (
            f"it wants the class {foreign}, and only tensors, numbers, text and argparse.Namespace are"
            " allowed; a file that needs more can run code: do not open it unless you trust its source"
        )
    # Only the first sentence: torch goes on to recommend loading the file without protection.
    reason = first_line(error).split(". ")[0]
    return f"{reason}; is the file complete, and is it a PyTorch checkpoint?"


def _class_in_bare_pickle(path: Path) -> str | None:
    """Returns the first class that a pickle outside a zip archive asks for, without running any of it."""
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if opcode.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    except Exception:  # not a pickle: genops may raise anything
        pass
    return None


class _Content:
    """Turns what a file holds into numpy arrays and dicts, within limits."""

    def __init__(self, max_bytes: int) -> None:
        self._values, self._bytes = MAX_VALUES, max_bytes

    def to_numpy(self, value: Any, depth: int = 0) -> Any:
        """Returns the value; raises ValueError if it is larger than any checkpoint of the file's size."""
        import torch

        if isinstance(value, torch.Tensor):
            self._spend(value.numel() * value.element_size())
            return _array(value.detach().contiguous())
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if not isinstance(value, Mapping | list | tuple):
            return value
        if depth == MAX_DEPTH:
            raise ValueError(f"it holds lists in lists, more than {MAX_DEPTH} deep")
        self._spend(0)
        if isinstance(value, Mapping):
            return {key: self.to_numpy(item, depth + 1) for key, item in value.items()}
        if any(isinstance(item, Mapping | list | tuple | torch.Tensor) for item in value):
            return [self.to_numpy(item, depth + 1) for item in value]
        return value if isinstance(value, list) else list(value)

    def _spend(self, size: int) -> None:
        self._values, self._bytes = self._values - 1, self._bytes - size
        if self._values < 0:
            raise ValueError(f"it holds more than {MAX_VALUES:,} tensors and lists")
        if self._bytes < 0:
            raise ValueError("its tensors claim many times the size of the file")


def _array(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class _Kind:
    """Stands for `numpy.dtype` in a pickle: a plain number's kind and its byte order."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", name):
            raise ValueError(f"a number of the kind {name!r}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _scalar(kind: _Kind, data: bytes) -> Any:
    """Returns the number that a pickled numpy scalar holds, as one of Python's."""
    return np.frombuffer(data, kind.order + kind.name, count=1)[0].item()


def _nothing(*_: Any) -> None:
    """Stands for what a ``defaultdict`` would call."""


def _defaultdict(*_: Any) -> dict[Any, Any]:
    """Returns what stands for a ``defaultdict``."""
    return {}


ALLOWED: list[Any] = [  # classes, and functions in place of others
    argparse.Namespace,
    (_Kind, "numpy.dtype"),
    *((_scalar, f"{module}.scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    (_defaultdict, "collections.defaultdict"),
    *((_nothing, f"builtins.{name}") for name in ("bool", "dict", "float", "int", "list", "str")),
    *(
        (dict, f"{module}.AttributeDict")
        for module in (
            *("lightning.fabric.utilities.data", "lightning_fabric.utilities.data"),
            "pytorch_lightning.utilities.parsing",
        )
    ),
]


def _to_torch(value: Any) -> Any:
    import torch

    if isinstance(value, np.ndarray):
        value = np.array(value, order="C")
        if value.dtype.name == "bfloat16":
            return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: _to_torch(item) for key, item in value.items()}
    return value
