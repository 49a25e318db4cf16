"""Golden files, and how their arrays are compared.

A golden file (``.npz``) holds the configuration, weights and inputs of a model and everything that the
PyTorch code computed from them in float64; ``docs/parity.md`` describes the format. The error of an array
is the largest absolute difference over the largest magnitude in the file's array.
"""

import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bvit_jax.errors import UserError
from bvit_jax.files import parse_json

FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 1e-6  # for arrays stored in float32
MAX_BYTES = 1 << 29  # of all arrays of a golden file

Arrays = dict[str, np.ndarray]

# What numpy, zipfile and json raise for damaged files and for files of other kinds.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Row:
    """The comparison of one group of arrays.

    Attributes:
      group: what was compared.
      count: number of arrays.
      error: worst relative error, infinite where an array is missing or of another shape.
      where: name of the array with the worst error.
      ratio: worst error over its tolerance.
    """

    group: str
    count: int
    error: float
    where: str
    ratio: float

    @property
    def passed(self) -> bool:
        return self.ratio <= 1  # False for NaN


class GoldenFile:
    """A golden file in memory.

    Raises:
      UserError: the file is missing, damaged, or not a golden file of a supported model.
    """

    def __init__(self, path: Path) -> None:
        try:
            # Opened here, because numpy does not close what it cannot read.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                _check_sizes(archive.zip)
                self.arrays: Arrays = {name: archive[name] for name in archive.files}
            self.meta: dict[str, Any] = dict(parse_json(str(self.arrays.pop("meta")[()])))
        except FileNotFoundError:
            raise UserError(f"no file {path}; expected a golden .npz file") from None
        except KeyError:
            raise UserError(f"{path} has no 'meta': it is not a golden file") from None
        except _UNREADABLE as error:
            raise UserError(f"cannot read {path}: {error}; expected a golden .npz file") from error

    def group(self, prefix: str) -> Arrays:
        """Returns the arrays whose names start with ``prefix/``, under the rest of their names."""
        start = prefix + "/"
        return {n[len(start) :]: a for n, a in self.arrays.items() if n.startswith(start)}

    def array(self, name: str) -> np.ndarray:
        """Returns one array; raises `UserError` if there is none."""
        if name not in self.arrays:
            raise UserError(f"the golden file has no array {name!r}")
        return self.arrays[name]

    def float64(self, name: str) -> np.ndarray:
        """Returns one array in float64."""
        return self.array(name).astype(np.float64)

    def images(self, name: str = "input/images") -> np.ndarray:
        """Returns images in float64, channels last; leading axes are kept."""
        return np.moveaxis(self.float64(name), -3, -1)


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Raises ValueError if arrays are too large, or claim more than there is: numpy would allocate first."""
    if (total := sum(member.file_size for member in archive.infolist())) > MAX_BYTES:
        raise ValueError(f"it claims {total:,} bytes; expected at most {MAX_BYTES:,}")
    for member in archive.infolist():
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read_header = np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
        if math.prod(shape) * dtype.itemsize > member.file_size:
            raise ValueError(f"{member.filename} claims the shape {shape} and has {member.file_size:,} bytes")


def compare(
    group: str,
    ours: Mapping[str, Any],
    golden: Mapping[str, np.ndarray],
    floors: Mapping[str, float] | None = None,
) -> Row:
    """Compares arrays by name; ``floors`` holds lower bounds of the scale that errors are divided by."""
    floors = floors or {}
    errors = {}
    for name in sorted(golden.keys() | ours.keys()):
        if name not in ours or name not in golden or np.shape(ours[name]) != golden[name].shape:
            errors[name] = (np.inf, np.inf)
            continue
        file = golden[name]
        difference = np.abs(np.asarray(ours[name], np.float64) - file.astype(np.float64))
        scale = max(float(np.max(np.abs(file), initial=0)), floors.get(name, 0.0)) or 1.0
        error = float(np.max(difference, initial=0)) / scale
        narrow = file.dtype != np.float64
        errors[name] = (error, error / (FLOAT32_TOLERANCE if narrow else FLOAT64_TOLERANCE))
    where, (error, ratio) = max(
        errors.items(), key=lambda item: np.inf if np.isnan(item[1][1]) else item[1][1]
    )
    return Row(group, len(errors), error, where, ratio)
