"""Packed files: a model as the engine of `bvit_jax.inference` runs it, its signs in the bits of words.

A directory with two files. ``model.safetensors`` holds the folded arrays by their names, words uint32 with
32 channels each, real numbers float32, or float16 where that was asked for. ``config.json`` holds the name
of the format, the version of its layout, the settings of the model, its preprocessing, class names and
history, and the SHA-256 of the arrays. Latent weights are gone: nothing leads back. Needs no Flax.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bvit_jax.errors import UserError
from bvit_jax.files import read_json
from bvit_jax.files.appearing import appearing, to_json, write
from bvit_jax.weights import tensor_files
from bvit_jax.weights.preprocessing import Preprocessing

FORMAT = "bvit_jax_packed"
LAYOUT = 1  # of the arrays' names and of what they hold
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
KINDS = {np.dtype(kind) for kind in ("uint32", "float32", "float16")}


class Settings(dict[str, Any]):
    """The name and the settings of a model, whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Packed:
    """A folded model, and what is needed to use it.

    Attributes:
      config: the name and all settings of the model.
      folded: its arrays as they are stored.
      preprocessing: from an image file to the model's input.
      class_names: one per class.
      history: the files that the weights came from, oldest first: name, SHA-256, format.
      source: SHA-256 of the weights that were folded.
    """

    config: Settings
    folded: Mapping[str, np.ndarray]
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    history: tuple[Mapping[str, Any], ...] = ()
    source: str = ""
    assumed: tuple[str, ...] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays as the engine takes them, real numbers in float32."""
        return {
            name: array if array.dtype == np.uint32 else array.astype(np.float32)
            for name, array in self.folded.items()
        }

    def digest(self) -> str:
        """Returns the SHA-256 of the arrays."""
        total = hashlib.sha256()
        for name, array in sorted(self.folded.items()):
            total.update(f"{name} {array.dtype} {array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()


def is_packed(path: Path) -> bool:
    """Returns whether a path is the directory of a packed model, or one of its two files."""
    directory = path.parent if path.name in (CONFIG_FILE, WEIGHTS_FILE) else path
    try:
        values = read_json(directory / CONFIG_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def write_packed(model: Packed, target: Path, version: str) -> None:
    """Writes a packed model as a directory, which must not exist and appears complete or not at all.

    Args:
      model: what to write.
      target: the directory.
      version: of this package, for the record.

    Raises:
      UserError: the target exists or cannot be written.
    """
    with appearing(target) as partial:
        partial.mkdir()
        content = tensor_files.encode_safetensors(model.folded, {"format": FORMAT})
        write(partial / WEIGHTS_FILE, content)
        values = {"format": FORMAT, "layout": LAYOUT} | described(model, version)
        write(partial / CONFIG_FILE, to_json(values))


def described(model: Packed, version: str) -> dict[str, Any]:
    """Returns what is said of a model beyond its arrays, as JSON; ``version`` is that of this package."""
    return {
        "version": version,
        "model": dict(model.config),
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "class_names": list(model.class_names),
        "history": [dict(entry) for entry in model.history],
        "source": model.source,
        "digest": model.digest(),
    }


def read_packed(path: Path) -> Packed:
    """Reads a packed model.

    Args:
      path: its directory, or one of its two files.

    Raises:
      UserError: a file is missing, damaged, or of another layout.
    """
    path = path.parent if path.name in (CONFIG_FILE, WEIGHTS_FILE) else path
    try:
        values = read_json(path / CONFIG_FILE)
        layout = values["layout"]
        if layout != LAYOUT:
            raise UserError(
                f"{path} has the layout {layout!r} of packed models, and this version reads {LAYOUT}; export"
                " it again"
            )
        folded, _ = tensor_files.read_safetensors(path / WEIGHTS_FILE)
        model = Packed(
            config=Settings(_tuples(values["model"])),
            folded=folded,
            preprocessing=Preprocessing(**_tuples(values["preprocessing"])),
            class_names=tuple(values["class_names"]),
            history=tuple(dict(entry) for entry in values["history"]),
            source=values["source"],
        )
        texts = (model.config["name"], *model.class_names)
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise TypeError("a name in it is not one line of text")
        digest = values["digest"]
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise UserError(f"{path / CONFIG_FILE} is damaged: {error!r}; export the model again") from error
    if any(array.dtype not in KINDS for array in folded.values()) or model.digest() != digest:
        raise UserError(
            f"{path}: its arrays are not those that its {CONFIG_FILE} was written for: they were changed or"
            " damaged, or are another model's; export the model again"
        )
    return model


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
