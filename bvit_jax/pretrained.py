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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from bvit_jax import labels, models, tensor_files
from bvit_jax.errors import UserError, nearest
from bvit_jax.formats import FORMATS, Preprocessing, RawCheckpoint, Understood, huggingface
from bvit_jax.layers import bias_init, kernel_init
from bvit_jax.positions import resize_positions
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
DOCUMENT = "bvit_jax"  # key of the document in other people's files
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
WEIGHTS_KEYS = ("model", "state_dict", "module")  # of training checkpoints that hold more than weights


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
    raw, left_out = _read(path, config_file, weights_key)
    overrides = overrides or {}
    if "params" in {name.partition("/")[0] for name in raw.state}:
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
    names = understood.class_names or tuple(raw.document.get("class_names", ()))
    if len(names) != config.num_classes:
        names = labels.default_names(config.num_classes)
    return Pretrained(
        config=config,
        variables=variables,
        preprocessing=(_preprocessing(raw.document) or understood.preprocessing).scaled_to(config.image_size),
        class_names=names,
        history=_extended_history(raw, name),
        bookkeeping=bookkeeping,
        bookkeeping_format=name,
        assumed=understood.assumed,
        left_out=left_out,
    )


def _overridden(
    understood: Understood, document: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Understood:
    """Returns the model with what the document knows beyond the format, and with the user's overrides."""
    known = _tuples(document.get("model", {}))
    if known.pop("name", understood.model) != understood.model:
        known = {}
    settings = known | understood.settings if not understood.assumed else understood.settings | known
    assumed = () if known else understood.assumed
    assumed = tuple(text for text in assumed if text.split()[0] not in overrides)
    return dataclasses.replace(understood, settings=settings | dict(overrides), assumed=assumed)


def _from_native(raw: RawCheckpoint, overrides: Mapping[str, Any]) -> Pretrained:
    try:
        settings = _tuples(raw.document["model"]) | dict(overrides)
        config = models.model_config(settings.pop("name"), **settings)
        preprocessing = _preprocessing(raw.document)
        names = tuple(map(str, raw.document["class_names"]))
        history = tuple(map(dict, raw.document["history"]))
        book_format = raw.document["bookkeeping"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{raw.origin} does not describe a model of this project: {error!r}") from error
    if preprocessing is None or len(names) != config.num_classes:
        raise UserError(f"{raw.origin}: its preprocessing or class_names do not fit the model")
    abstract = abstract_variables(models.create_model(config), config.image_size)
    found = {key: a for key, a in raw.state.items() if not key.startswith("bookkeeping/")}
    bookkeeping = {key.removeprefix("bookkeeping/"): a for key, a in raw.state.items() if key not in found}
    with _naming(raw.origin):
        variables = _from_flat(found, abstract)
    return Pretrained(config, variables, preprocessing, names, history, bookkeeping, book_format)


def _read(
    path: Path, config_file: Path | None, weights_key: str | None
) -> tuple[RawCheckpoint, tuple[str, ...]]:
    values = {} if config_file is None else _read_json(config_file)
    if weights_key is not None and path.suffix not in tensor_files.TORCH_SUFFIXES:
        raise UserError(f"{path} is no .pth file, in which --key would choose; leave it out")
    if path.is_dir():
        return _read_directory(path, values), ()
    if not path.exists():
        raise UserError(f"no file or directory {path}; expected a checkpoint")
    if path.name.endswith(tensor_files.INDEX_SUFFIX):
        return _read_directory(path.parent, values), ()
    if path.suffix == tensor_files.SAFETENSORS_SUFFIX:
        state, metadata = tensor_files.read_safetensors(path)
        described = _parse_description(path, metadata.get(DOCUMENT))
        return _raw(state, values or described, (path,)), ()
    if path.suffix in tensor_files.TORCH_SUFFIXES:
        return _read_torch(path, values, weights_key)
    raise UserError(
        f"{path} is of no known kind; expected a directory, {tensor_files.SAFETENSORS_SUFFIX} or"
        f" {', '.join(tensor_files.TORCH_SUFFIXES)}"
    )


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
    else:
        raise UserError(f"no {WEIGHTS_FILE} in {path}; expected it beside {CONFIG_FILE}")
    expected = values.get("weights_sha256")
    if expected and expected != tensor_files.sha256(weights):
        raise UserError(
            f"{weights} is not the file that {CONFIG_FILE} describes: its SHA-256 is another; it was"
            " changed or damaged, convert it again from its source"
        )
    processor_file = path / huggingface.PROCESSOR_FILE
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
    if not isinstance(state, dict) or not all(isinstance(a, np.ndarray) for a in state.values()):
        where = "" if key is None else f" under {key!r}"
        raise UserError(f"{path} holds no state dict{where}; expected names and tensors")
    described = _parse_description(path, others.pop(DOCUMENT, None))
    args = others.pop("args", {})
    raw = _raw(state, values or described, (path,), args=args if isinstance(args, dict) else {})
    return raw, tuple(sorted(map(str, others)))


def _raw(
    state: StateDict,
    values: Mapping[str, Any],
    files: tuple[Path, ...],
    **more: Mapping[str, Any],
) -> RawCheckpoint:
    document = values if values.get("format") == DOCUMENT else values.get(DOCUMENT, {})
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): a for name, a in state.items()}
    origin = str(files[0]) if len(files) == 1 else str(files[0].parent)
    return RawCheckpoint(state, values, document=document, files=files, origin=origin, **more)


def _recognise(raw: RawCheckpoint) -> str:
    if raw.document.get("naming") in FORMATS:
        return raw.document["naming"]
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not values:
            raise ValueError("it describes nothing")
        return values
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; expected the JSON of a model") from error


def _parse_description(path: Path, text: Any) -> dict[str, Any]:
    """Returns the ``config.json`` that a file holds; empty if it is another's and holds none."""
    if text is None:
        return {}
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: its description is damaged: {error}") from error


def _preprocessing(document: Mapping[str, Any]) -> Preprocessing | None:
    if "preprocessing" not in document:
        return None
    try:
        return Preprocessing(**_tuples(document["preprocessing"]))
    except TypeError as error:
        raise UserError(f"the preprocessing in {CONFIG_FILE} is not understood: {error}") from error


def _extended_history(raw: RawCheckpoint, name: str) -> tuple[Mapping[str, Any], ...]:
    files = [{"file": file.name, "sha256": tensor_files.sha256(file), "format": name} for file in raw.files]
    return (*map(dict, raw.document.get("history", ())), *files)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


# --- changing ----------------------------------------------------------------------------------


def resized(pretrained: Pretrained, image_size: int) -> Pretrained:
    """Returns the model for another image size, position embeddings interpolated as DeiT does.

    Raises:
      UserError: the model cannot have that size.
    """
    old = pretrained.config
    config = old.copy_and_resolve_references()
    config.image_size = image_size
    extra = sum(bool(old.get(key, key == "class_token" and old.name == "deit")) for key in _EXTRA_TOKENS)
    abstract = abstract_variables(models.create_model(config), image_size)

    def resize(path: tuple, array: np.ndarray, target: jax.ShapeDtypeStruct) -> np.ndarray:
        if array.shape == target.shape:
            return array
        first = extra if path_name(path).startswith("params/embedding/") else 0
        return resize_positions(array, first, round((target.shape[1] - first) ** 0.5))

    variables = jax.tree_util.tree_map_with_path(resize, pretrained.variables, abstract)
    return dataclasses.replace(
        pretrained,
        config=config,
        variables=variables,
        preprocessing=pretrained.preprocessing.scaled_to(image_size),
        bookkeeping=_resized_bookkeeping(pretrained, config),
    )


_EXTRA_TOKENS = ("class_token", "distillation_token")


def _resized_bookkeeping(pretrained: Pretrained, config: ConfigDict) -> StateDict:
    """Returns the bookkeeping with the masks of the new size."""
    if not pretrained.bookkeeping:
        return {}
    constants = FORMATS[pretrained.bookkeeping_format].bookkeeping(config, {})
    masks = {name: a for name, a in constants.items() if name.endswith("attn_mask")}
    kept = {name: a for name, a in pretrained.bookkeeping.items() if not name.endswith("attn_mask")}
    return kept | masks


def with_new_head(pretrained: Pretrained, class_names: tuple[str, ...]) -> Pretrained:
    """Returns the model with newly initialised classifiers for other classes."""
    config = pretrained.config.copy_and_resolve_references()
    config.num_classes = len(class_names)
    params = dict(pretrained.variables["params"])
    for i, name in enumerate(name for name in ("head", "distillation_head") if name in params):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        fan_in = kernel.shape[0]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        new_kernel = kernel_init(config.weight_init, fan_in)(keys[0], (fan_in, config.num_classes))
        new_bias = bias_init(config.weight_init, fan_in)(keys[1], (config.num_classes,))
        params[name] = {
            "kernel": np.asarray(new_kernel, kernel.dtype),
            "bias": np.asarray(new_bias, bias.dtype),
        }
    variables = pretrained.variables | {"params": params}
    return dataclasses.replace(pretrained, config=config, variables=variables, class_names=class_names)


def with_class_names(pretrained: Pretrained, class_names: tuple[str, ...]) -> Pretrained:
    """Returns the model with other names for its classes."""
    return dataclasses.replace(pretrained, class_names=class_names)


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
            metadata = {"format": "pt", DOCUMENT: json.dumps(values)}
            _write(partial, tensor_files.encode_safetensors(state, metadata))
        elif target.suffix in tensor_files.TORCH_SUFFIXES:
            tensor_files.write_torch(partial, {"model": state, DOCUMENT: json.dumps(values)})
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
    document = {
        "format": DOCUMENT,
        "naming": file_format,
        "version": version("bvit_jax"),
        "model": config.to_dict(),
        "preprocessing": dataclasses.asdict(pretrained.preprocessing),
        "class_names": list(pretrained.class_names),
        "history": [dict(entry) for entry in pretrained.history],
        "bookkeeping": pretrained.bookkeeping_format,
    }
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
    return state, values | {DOCUMENT: document}


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
