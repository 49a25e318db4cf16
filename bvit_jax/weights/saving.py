"""Saving: a model with its weights as a directory or file of any format."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError, nearest
from bvit_jax.weights import tensor_files
from bvit_jax.weights.document import KEY as DOCUMENT_KEY
from bvit_jax.weights.document import Document
from bvit_jax.weights.formats import FORMATS
from bvit_jax.weights.pretrained import Pretrained, flatten
from bvit_jax.weights.raw_checkpoint import CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE
from bvit_jax.weights.state_dicts import StateDict, to_state_dict

NATIVE = "native"


def save(pretrained: Pretrained, target: Path, file_format: str = NATIVE) -> None:
    """Writes a model as a directory, or as one file if the target ends in the suffix of one.

    The target must not exist, and appears complete or not at all.

    Raises:
      UserError: the target exists or cannot be written, or the format cannot hold the model.
    """
    state, values = to_format(pretrained, file_format)
    with _appearing(target) as partial:
        if target.suffix == tensor_files.SAFETENSORS_SUFFIX:
            metadata = {"format": "pt", DOCUMENT_KEY: json.dumps(values)}
            _write(partial, tensor_files.encode_safetensors(state, metadata))
        elif target.suffix in tensor_files.TORCH_SUFFIXES:
            tensor_files.write_torch(partial, {"model": state, DOCUMENT_KEY: json.dumps(values)})
        else:
            partial.mkdir()
            content = tensor_files.encode_safetensors(state, {"format": "pt"})
            _write(partial / WEIGHTS_FILE, content)
            _write(partial / CONFIG_FILE, _json(values))
            if file_format in FORMATS and (processor := FORMATS[file_format].processor):
                _write(partial / PROCESSOR_FILE, _json(processor(pretrained.preprocessing)))


def to_format(pretrained: Pretrained, file_format: str) -> tuple[StateDict, dict[str, Any]]:
    """Returns the arrays and the ``config.json`` of a model in a format.

    Raises:
      UserError: there is no such format, or it cannot hold the model.
    """
    config = pretrained.config
    document = Document(
        naming=file_format,
        model=config.to_dict(),
        preprocessing=pretrained.preprocessing,
        class_names=pretrained.class_names,
        history=pretrained.history,
        bookkeeping=pretrained.bookkeeping_format,
        digest=pretrained.digest(),
    ).to_json()
    if file_format == NATIVE:
        state = flatten(pretrained.variables)
        return state | {f"bookkeeping/{k}": a for k, a in pretrained.bookkeeping.items()}, document
    if file_format not in FORMATS:
        raise UserError(f"no format {file_format!r}" + nearest(file_format, [NATIVE, *FORMATS]))
    known = FORMATS[file_format]
    if config.name not in known.models:
        able = [name for name, other in FORMATS.items() if config.name in other.models]
        raise UserError(
            f"the format {file_format!r} has no {config.name!r}, only {', '.join(known.models)}; use"
            f" {' or '.join([NATIVE, *able])}"
        )
    known.check(config)
    state = to_state_dict(pretrained.variables, known.naming(config))
    if pretrained.bookkeeping_format == file_format and pretrained.bookkeeping:
        state |= pretrained.bookkeeping
    elif known.writes_constants:
        state |= known.constants(config, state)
    values = known.describe(config, pretrained.class_names, pretrained.preprocessing)
    return state, values | {DOCUMENT_KEY: document}


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yields a path to write to, whose content becomes ``target`` at the end, complete or not at all."""
    taken = UserError(f"{target} exists; delete it or choose another target")
    try:
        if os.path.lexists(target):
            raise taken
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".convert.", dir=target.parent) as scratch:
            partial = Path(scratch) / "partial"
            yield partial
            _move(partial, target)
    except (FileExistsError, NotADirectoryError) as error:
        raise taken if os.path.lexists(target) else UserError(f"cannot write {target}: {error}") from error
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        if isinstance(error, OSError) and error.errno == errno.ENOTEMPTY:
            raise taken from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}") from error


def _move(partial: Path, target: Path) -> None:
    """Renames a directory or a file; never replaces another file."""
    if partial.is_dir():
        partial.rename(target)
        return
    try:
        os.link(partial, target)
    except PermissionError:  # a file system without links
        partial.rename(target)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
