"""Models with their weights, read from and written to files of any format of `bvit_jax.formats`.

The native format is a directory with ``config.json`` and ``model.safetensors``, or one file of either
``.safetensors`` or ``.pth`` that holds both. What this project knows about a model - its settings,
classes, preprocessing and where it came from - travels with it in every format, as the *document*.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from bvit_jax import labels, models, tensor_files
from bvit_jax.document import KEY as DOCUMENT_KEY
from bvit_jax.document import Document
from bvit_jax.errors import UserError, nearest
from bvit_jax.formats import FORMATS, Preprocessing, RawCheckpoint, Understood, huggingface
from bvit_jax.raw_checkpoints import CONFIG_FILE, WEIGHTS_FILE, read_raw
from bvit_jax.state_dicts import (
    StateDict,
    Variables,
    abstract_variables,
    check_fit,
    from_state_dict,
    to_state_dict,
)
from bvit_jax.torch_names import path_name

NATIVE = "native"


@dataclass(frozen=True)
class Pretrained:
    """A model, its weights, and what one must know to use it.

    Attributes:
      config: the model's configuration.
      variables: numpy arrays in the dtypes of the file.
      preprocessing: from an image file to the model's input.
      class_names: one a class.
      history: the files that the weights came from, oldest first: name, SHA-256, format.
      bookkeeping: arrays of the PyTorch file that say nothing about the function, kept for the way
        back, and the format whose names they have.
      assumed: settings that the file did not determine, in words.
      left_out: entries of a training checkpoint that are no weights.
    """

    config: ConfigDict
    variables: Variables
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    history: tuple[Mapping[str, Any], ...] = ()
    bookkeeping: StateDict = field(default_factory=dict)
    bookkeeping_format: str = ""
    assumed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def arrays(self, dtype: DTypeLike = np.float32) -> Variables:
        """Returns the variables in one dtype."""
        return jax.tree.map(lambda a: np.asarray(a, dtype), self.variables)

    def digest(self) -> str:
        """Returns a SHA-256 of the weights, the same whatever file they came from."""
        total = hashlib.sha256()
        for name, array in sorted(_flat(self.variables).items()):
            total.update(f"{name} {array.dtype} {array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()


# --- reading -----------------------------------------------------------------------------------


def load(
    path: Path,
    *,
    config_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
) -> Pretrained:
    """Reads a model from a directory or file of any format.

    Args:
      path: a native or Hugging Face or timm directory, a ``.safetensors`` or a ``.pth`` file.
      config_file: the ``config.json`` for a file that has none beside it.
      overrides: settings of the model to use instead of what the files say.
      weights_key: entry of a ``.pth`` that holds the weights, such as "model_ema".

    Raises:
      UserError: a file is missing, damaged or malicious, its format is unknown, or its arrays are not
        those of the model that it describes.
    """
    raw, left_out = read_raw(path, config_file, weights_key)
    overrides = overrides or {}
    if any(name.startswith("params/") for name in raw.state):
        return _from_native(raw, overrides)
    name = _recognise(raw)
    understood = FORMATS[name].understand(raw)
    understood = _overridden(understood, raw.document, overrides)
    config = models.model_config(understood.model, **understood.settings)
    naming = FORMATS[name].naming(config)
    abstract = abstract_variables(models.create_model(config), config.image_size)
    bookkeeping = {key: a for key, a in raw.state.items() if naming.is_bookkeeping(key)}
    _check_bookkeeping(raw, bookkeeping, FORMATS[name].bookkeeping(config, raw.state))
    with _naming(raw.origin):
        variables = from_state_dict(raw.state, abstract, None, naming)
    document = raw.document
    names = understood.class_names or (document.class_names if document else ())
    if len(names) != config.num_classes:
        names = labels.default_names(config.num_classes)
    preprocessing = document.preprocessing if document else understood.preprocessing
    return Pretrained(
        config=config,
        variables=variables,
        preprocessing=preprocessing.scaled_to(config.image_size),
        class_names=names,
        history=_extended_history(raw, name),
        bookkeeping=bookkeeping,
        bookkeeping_format=name,
        assumed=understood.assumed,
        left_out=left_out,
    )


def _overridden(
    understood: Understood, document: Document | None, overrides: Mapping[str, Any]
) -> Understood:
    """Returns the model with what the document knows beyond the format, and with the user's overrides."""
    known = dict(document.model) if document else {}
    if known.pop("name", None) != understood.model:
        known = {}
    # What the files determine counts more than the document, what would be assumed counts less.
    settings = understood.settings | known if understood.assumed else known | understood.settings
    assumed = () if known else understood.assumed
    assumed = tuple(text for text in assumed if text.split()[0] not in overrides)
    return dataclasses.replace(understood, settings=settings | dict(overrides), assumed=assumed)


def _from_native(raw: RawCheckpoint, overrides: Mapping[str, Any]) -> Pretrained:
    document = raw.document
    if document is None:
        raise UserError(f"{raw.origin} has the names of this project, and no {CONFIG_FILE} of it beside them")
    with _naming(raw.origin):
        settings = dict(document.model) | dict(overrides)
        config = models.model_config(settings.pop("name"), **settings)
        abstract = abstract_variables(models.create_model(config), config.image_size)
        names, preprocessing = document.class_names, document.preprocessing
        if len(names) != config.num_classes or preprocessing.crop != config.image_size:
            raise UserError("its preprocessing or class_names do not fit the model")
        prefix = "bookkeeping/"
        bookkeeping = {n.removeprefix(prefix): a for n, a in raw.state.items() if n.startswith(prefix)}
        variables = _from_flat({n: a for n, a in raw.state.items() if not n.startswith(prefix)}, abstract)
    return Pretrained(
        config, variables, preprocessing, names, document.history, bookkeeping, document.bookkeeping
    )


def _recognise(raw: RawCheckpoint) -> str:
    if raw.document is not None and raw.document.naming in FORMATS:
        return raw.document.naming
    for name, known in FORMATS.items():
        if known.recognise(raw):
            return name
    raise UserError(
        f"{raw.origin} holds no model that this project knows: its arrays are called"
        f" {', '.join(sorted(raw.state)[:3]) or 'nothing'}...; expected the names of the BinaryViT code,"
        " timm, Microsoft's Swin, or a directory of Hugging Face's ViT, DeiT or Swin"
    )


def _check_bookkeeping(raw: RawCheckpoint, found: StateDict, expected: StateDict) -> None:
    """Raises `UserError` if constants of a file are others than those our model computes with."""
    for name, array in found.items():
        constant = expected.get(name)
        if name.endswith("num_batches_tracked") or constant is None:
            continue
        if not np.array_equal(np.ravel(array), np.ravel(constant)):  # shapes vary between versions
            raise UserError(
                f"{raw.origin}: the constant {name} is another than this project computes with; is it a"
                " checkpoint of a changed model?"
            )


@contextmanager
def _naming(origin: str) -> Iterator[None]:
    """Puts the file's name before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        error.args = (f"{origin}: {error}",)
        raise


def _extended_history(raw: RawCheckpoint, name: str) -> tuple[Mapping[str, Any], ...]:
    files = [{"file": file.name, "sha256": tensor_files.sha256(file), "format": name} for file in raw.files]
    return (*(raw.document.history if raw.document else ()), *files)


# --- writing -----------------------------------------------------------------------------------


def save(pretrained: Pretrained, target: Path, file_format: str = NATIVE) -> None:
    """Writes a model as a directory, or as one file if the target ends in a file's suffix.

    The target appears whole or not at all, and must not exist.

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
            if file_format == NATIVE:
                values["weights_sha256"] = tensor_files.sha256(partial / WEIGHTS_FILE)
            _write(partial / CONFIG_FILE, _json(values))
            if file_format == huggingface.NAME:
                processor = huggingface.describe_processor(pretrained.preprocessing)
                _write(partial / huggingface.PROCESSOR_FILE, _json(processor))


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
    ).to_json()
    if file_format == NATIVE:
        state = _flat(pretrained.variables)
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
    state = to_state_dict(pretrained.variables, known.naming(config))
    if pretrained.bookkeeping_format == file_format and pretrained.bookkeeping:
        state |= pretrained.bookkeeping
    else:
        state |= known.bookkeeping(config, state)
    values = known.describe(config, pretrained.class_names, pretrained.preprocessing)
    return state, values | {DOCUMENT_KEY: document}


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yields a path beside ``target`` to write to, and renames it to ``target`` at the end."""
    if target.exists():
        raise UserError(f"{target} exists; delete it or choose another target")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.rename(target)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _flat(variables: Variables) -> StateDict:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {path_name(path): np.asarray(array) for path, array in leaves}


def _from_flat(state: StateDict, abstract: Variables) -> Variables:
    """Undoes `_flat`, with the checks and the messages of `from_state_dict`."""
    expected = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    check_fit(state, expected)
    return jax.tree_util.tree_map_with_path(lambda path, _: state[path_name(path)], abstract)
