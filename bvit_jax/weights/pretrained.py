"""Models with their weights, read from and written to files of any format of `bvit_jax.weights.formats`.

The native format is a directory with ``config.json`` and ``model.safetensors``, or one file of either
``.safetensors`` or ``.pth`` that holds both. What this project knows about a model - its settings,
classes, preprocessing and where it came from - travels with it in every format, as the *document*.
"""

import dataclasses
import errno
import fnmatch
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.errors import UserError, nearest
from bvit_jax.weights import files as tensor_files
from bvit_jax.weights import labels
from bvit_jax.weights.document import KEY as DOCUMENT_KEY
from bvit_jax.weights.document import Document
from bvit_jax.weights.formats import FORMATS, Preprocessing, RawCheckpoint, Understood, huggingface, reference
from bvit_jax.weights.names import Naming, path_name
from bvit_jax.weights.raw_checkpoints import CONFIG_FILE, WEIGHTS_FILE, read_raw
from bvit_jax.weights.state_dicts import (
    StateDict,
    Variables,
    abstract_variables,
    check_fit,
    from_state_dict,
    to_state_dict,
)

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

    def unused(self) -> tuple[str, ...]:
        """Returns the names of the kept arrays that PyTorch's modules own and never read, in order."""
        if not self.bookkeeping:
            return ()
        naming = FORMATS[self.bookkeeping_format].naming(self.config)
        return tuple(sorted(filter(naming.is_unused, self.bookkeeping)))

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
    ignored: Sequence[str] = (),
) -> Pretrained:
    """Reads a model from a directory or file of any format.

    Args:
      path: a native or Hugging Face or timm directory, a ``.safetensors`` or a ``.pth`` file.
      config_file: a ``config.json`` to use instead of what is there.
      overrides: settings of the model to use instead of what the files say.
      weights_key: entry of a ``.pth`` that holds the weights, such as "model_ema".
      ignored: patterns of names of arrays to leave out, such as "vit.pooler.*".

    Raises:
      UserError: a file is missing, damaged or malicious, its format is unknown, or its arrays are not
        those of the model that it describes.
    """
    if "name" in (overrides or {}):
        raise UserError("the name of the model cannot be set; it follows from the arrays")
    raw, left_out = read_raw(path, config_file, weights_key)
    skipped = sorted(name for pattern in ignored for name in fnmatch.filter(raw.state, pattern))
    raw = dataclasses.replace(raw, state={n: a for n, a in raw.state.items() if n not in skipped})
    with _naming(raw.origin):
        if any(name.startswith("params/") for name in raw.state):
            model = _from_native(raw, overrides or {})
        else:
            model = _from_pytorch(raw, overrides or {})
    return dataclasses.replace(model, left_out=(*left_out, *skipped))


def _from_pytorch(raw: RawCheckpoint, overrides: Mapping[str, Any]) -> Pretrained:
    document, name = raw.document, _recognise(raw)
    understood = _overridden(_understand(raw, name), document, overrides)
    config = models.model_config(understood.model, **understood.settings)
    naming = FORMATS[name].naming(config)
    abstract = _abstract(config, raw)
    if name == reference.NAME:
        reference.check_bits(config, raw)
    bookkeeping = {key: a for key, a in raw.state.items() if naming.is_bookkeeping(key)}
    _check_bookkeeping(bookkeeping, FORMATS[name].constants(config, raw.state), naming)
    names = understood.class_names or (document.class_names if document else ())
    if len(names) != config.num_classes:
        names = labels.default_names(config.num_classes)
    preprocessing = document.preprocessing if document else understood.preprocessing
    model = Pretrained(
        config=config,
        variables=from_state_dict(raw.state, abstract, None, naming),
        preprocessing=preprocessing.scaled_to(config.image_size),
        class_names=names,
        history=_extended_history(raw, name),
        bookkeeping=bookkeeping,
        bookkeeping_format=name,
        assumed=understood.assumed,
    )
    if document is None or document.digest == model.digest():
        return model
    if "transformers_version" not in raw.values:
        raise UserError(_DAMAGED)
    # transformers keeps our description when it saves a model that it has trained further.
    return _from_pytorch(dataclasses.replace(raw, document=None), overrides)


_DAMAGED = (
    "its weights are not those that its description was written for; they were changed or damaged,"
    " convert them again from their source"
)


def _understand(raw: RawCheckpoint, name: str) -> Understood:
    try:
        return FORMATS[name].understand(raw)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # Values of a kind that nobody would write: the formats do not check each of them.
        raise UserError(f"its arrays or its configuration are not understood: {error!r}") from error


def _abstract(config: ConfigDict, raw: RawCheckpoint) -> Variables:
    """Returns the shapes of a model's variables; raises `UserError` for more blocks than arrays."""
    model = models.create_model(config)
    depth = config.depth if isinstance(config.depth, int) else sum(config.depth)
    if depth > len(raw.state):  # building it would take long
        raise UserError(f"config.model.depth is {config.depth}, and the file has {len(raw.state)} arrays")
    try:
        return abstract_variables(model, config.image_size)
    except (ValueError, ArithmeticError) as error:  # arrays larger than there can be
        raise UserError(f"a model of these sizes cannot be built: {error}") from error


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
        raise UserError(f"it has the names of this project, and no {CONFIG_FILE} of it beside it")
    settings = dict(document.model) | dict(overrides)
    config = models.model_config(settings.pop("name"), **settings)
    names, preprocessing = document.class_names, document.preprocessing
    if len(names) != config.num_classes or preprocessing.crop != config.image_size:
        raise UserError("the image size or the classes of its description do not fit the model")
    prefix = "bookkeeping/"
    bookkeeping = {n.removeprefix(prefix): a for n, a in raw.state.items() if n.startswith(prefix)}
    variables = _from_flat(
        {n: a for n, a in raw.state.items() if not n.startswith(prefix)}, _abstract(config, raw)
    )
    if bookkeeping:
        known = FORMATS.get(document.bookkeeping)
        if known is None:
            raise UserError(f"its bookkeeping is of an unknown format {document.bookkeeping!r}")
        names_there = to_state_dict(variables, known.naming(config))
        _check_bookkeeping(bookkeeping, known.constants(config, names_there), known.naming(config))
    model = Pretrained(
        config, variables, preprocessing, names, document.history, bookkeeping, document.bookkeeping
    )
    if document.digest != model.digest():
        raise UserError(_DAMAGED)
    return model


def _recognise(raw: RawCheckpoint) -> str:
    if raw.document is not None and raw.document.naming in FORMATS:
        return raw.document.naming
    for name, known in FORMATS.items():
        if known.recognise(raw):
            return name
    raise UserError(
        "it holds no model that this project knows: its arrays are called"
        f" {', '.join(sorted(raw.state)[:3]) or 'nothing'}...; expected the names of the BinaryViT code,"
        " Bi-ViT's code, timm, Microsoft's Swin, or a directory of Hugging Face's ViT, DeiT or Swin"
    )


def _check_bookkeeping(found: StateDict, expected: StateDict, naming: Naming) -> None:
    """Raises `UserError` if constants of a file are not those that our model computes with."""
    for name, array in found.items():
        module, _, kind = name.rpartition(".")
        constant = expected.get(f"{module}.weight_clip_val" if kind == "act_clip_val" else name)
        if constant is None:
            raise UserError(f"arrays that do not fit the model: 1 unexpected ({name})")
        # Their shapes vary between versions.
        counts = kind == "num_batches_tracked" and array.size == 1
        unused = naming.is_unused(name) and array.shape == constant.shape
        if not counts and not unused and not np.array_equal(np.ravel(array), np.ravel(constant)):
            raise UserError(
                f"the constant {name} is another than this project computes with; is it a checkpoint of a"
                " changed model?"
            )


@contextmanager
def _naming(origin: str) -> Iterator[None]:
    """Puts the file's name before the message of a `UserError` that does not begin with it."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith(origin):
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
        digest=pretrained.digest(),
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
    """Yields a path to write to, and moves what is there to ``target`` at the end, whole or not at all."""
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
    """Renames a directory, or a file without ever replacing another one."""
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


def _flat(variables: Variables) -> StateDict:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {path_name(path): np.asarray(array) for path, array in leaves}


def _from_flat(state: StateDict, abstract: Variables) -> Variables:
    """Undoes `_flat`, with the checks and the messages of `from_state_dict`."""
    expected = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    check_fit(state, expected)
    return jax.tree_util.tree_map_with_path(lambda path, _: state[path_name(path)], abstract)
