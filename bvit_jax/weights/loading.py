"""Loading: from a directory or file of any format to a model with its weights.

The native format is a directory with ``config.json`` and ``model.safetensors``, or one file, either
``.safetensors`` or ``.pth``, that holds both. What this project knows about a model - its settings,
classes, preprocessing and where it came from - travels with it in every format, as the *document*.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bvit_jax import models
from bvit_jax.errors import UserError, printable
from bvit_jax.weights import tensor_files
from bvit_jax.weights.class_names import default_class_names
from bvit_jax.weights.document import Document
from bvit_jax.weights.formats import FORMATS, Format, Interpretation
from bvit_jax.weights.headless import with_head
from bvit_jax.weights.naming import Naming, path_name
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.weights.raw_checkpoint import CONFIG_FILE, RawCheckpoint, read_raw, unwrapped
from bvit_jax.weights.state_dicts import (
    StateDict,
    Variables,
    abstract_variables,
    check_fit,
    from_state_dict,
    to_state_dict,
)


def load(
    path: Path,
    *,
    config_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    ignored: Sequence[str] = (),
    new_classes: int | None = None,
) -> Pretrained:
    """Reads a model from a directory or file of any format.

    Args:
      path: a directory in the native, Hugging Face or timm format, a ``.safetensors`` or a ``.pth`` file.
      config_file: a ``config.json`` to use instead of the one found there.
      overrides: settings of the model that take precedence over those in the files.
      weights_key: the entry of a ``.pth`` that holds the weights, such as "model_ema".
      ignored: patterns of the names of arrays to leave out, such as "vit.pooler.*".
      new_classes: for a backbone without a classifier, the classes of one that is all zeros.

    Raises:
      UserError: a file is missing, damaged or malicious, its format is unknown, or its arrays do
        not fit the model that it describes.
    """
    if "name" in (overrides or {}):
        raise UserError("the name of the model cannot be set: the arrays determine it")
    raw, left_out = read_raw(path, config_file, weights_key)
    state, skipped = unwrapped(raw.state, ignored)
    raw = dataclasses.replace(raw, state=state)
    if new_classes:
        raw, pooler = with_head(raw, new_classes)
        skipped = [*skipped, *pooler]
    with _prefixing(raw.origin):
        if any(name.startswith("params/") for name in raw.state):
            model = _from_native(raw, overrides or {})
        else:
            model = _from_pytorch(raw, overrides or {})
    return dataclasses.replace(model, left_out=(*left_out, *skipped))


def _from_pytorch(raw: RawCheckpoint, overrides: Mapping[str, Any]) -> Pretrained:
    document, known = raw.document, _recognise(raw)
    interpretation = _overridden(_interpret(raw, known), document, overrides)
    config = models.model_config(interpretation.model, **interpretation.settings)
    naming = known.naming(config)
    abstract = _abstract(config, raw)
    known.check_raw(config, raw)
    bookkeeping = {key: a for key, a in raw.state.items() if naming.is_bookkeeping(key)}
    _check_bookkeeping(bookkeeping, known.constants(config, raw.state), naming)
    names = interpretation.class_names or (document.class_names if document else ())
    if len(names) != config.num_classes:
        names = default_class_names(config.num_classes)
    preprocessing = document.preprocessing if document else interpretation.preprocessing
    model = Pretrained(
        config=config,
        variables=from_state_dict(raw.state, abstract, None, naming),
        preprocessing=preprocessing.scaled_to(config.image_size),
        class_names=tuple(map(printable, names)),
        history=_extended_history(raw, known.name),
        bookkeeping=bookkeeping,
        bookkeeping_format=known.name,
        assumed=interpretation.assumed,
    )
    if document is None or document.digest == model.digest():
        return model
    if "transformers_version" not in raw.values:
        raise UserError(_DAMAGED)
    # transformers keeps our description when it saves a model that it has fine-tuned.
    return _from_pytorch(dataclasses.replace(raw, document=None), overrides)


_DAMAGED = (
    "its weights are not those that its description was written for: they were changed or damaged;"
    " convert them again from their source"
)


def _interpret(raw: RawCheckpoint, known: Format) -> Interpretation:
    try:
        return known.interpret(raw)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # The formats do not check every value that no tool would write.
        raise UserError(f"its arrays or its configuration cannot be interpreted: {error!r}") from error


def _abstract(config: ConfigDict, raw: RawCheckpoint) -> Variables:
    """Returns the shapes of a model's variables; raises `UserError` if it has more blocks than arrays."""
    model = models.create_model(config)
    depth = config.depth if isinstance(config.depth, int) else sum(config.depth)
    if depth > len(raw.state):  # building it would take too long
        raise UserError(f"config.model.depth is {config.depth}, and the file has {len(raw.state)} arrays")
    try:
        return abstract_variables(model, config.image_size)
    except (ValueError, ArithmeticError) as error:  # impossibly large arrays
        raise UserError(f"a model of these sizes cannot be built: {error}") from error


def _overridden(
    found: Interpretation, document: Document | None, overrides: Mapping[str, Any]
) -> Interpretation:
    """Returns an interpretation completed by the document and changed by the user's overrides."""
    known = dict(document.model) if document else {}
    if known.pop("name", None) != found.model:
        known = {}
    # Settings that the files determine win over the document, which wins over assumptions.
    settings = found.settings | known if found.assumed else known | found.settings
    assumed = () if known else found.assumed
    assumed = tuple(text for text in assumed if text.split()[0] not in overrides)
    return dataclasses.replace(found, settings=settings | dict(overrides), assumed=assumed)


def _from_native(raw: RawCheckpoint, overrides: Mapping[str, Any]) -> Pretrained:
    document = raw.document
    if document is None:
        raise UserError(
            f"its arrays have the names of this project, but there is no {CONFIG_FILE} of it next to them"
        )
    settings = dict(document.model) | dict(overrides)
    config = models.model_config(settings.pop("name"), **settings)
    names, preprocessing = document.class_names, document.preprocessing
    if len(names) != config.num_classes or preprocessing.crop != config.image_size:
        raise UserError("the image size or the classes in its description do not fit the model")
    prefix = "bookkeeping/"
    bookkeeping = {n.removeprefix(prefix): a for n, a in raw.state.items() if n.startswith(prefix)}
    variables = _from_flat(
        {n: a for n, a in raw.state.items() if not n.startswith(prefix)}, _abstract(config, raw)
    )
    if bookkeeping:
        known = FORMATS.get(document.bookkeeping)
        if known is None:
            raise UserError(f"its bookkeeping has an unknown format {document.bookkeeping!r}")
        names_there = to_state_dict(variables, known.naming(config))
        _check_bookkeeping(bookkeeping, known.constants(config, names_there), known.naming(config))
    model = Pretrained(
        config, variables, preprocessing, names, document.history, bookkeeping, document.bookkeeping
    )
    if document.digest != model.digest():
        raise UserError(_DAMAGED)
    return model


def _recognise(raw: RawCheckpoint) -> Format:
    if raw.document is not None and raw.document.naming in FORMATS:
        return FORMATS[raw.document.naming]
    for known in FORMATS.values():
        if known.recognise(raw):
            return known
    raise UserError(
        "it holds no model that this project knows: its arrays are called"
        f" {', '.join(sorted(raw.state)[:3]) or 'nothing'}...; expected the names of the BinaryViT code,"
        " Bi-ViT's code, timm, Microsoft's Swin, or a directory of Hugging Face's ViT, DeiT or Swin"
    )


def _check_bookkeeping(found: StateDict, expected: StateDict, naming: Naming) -> None:
    """Raises `UserError` if the constants in a file differ from those that our model computes with."""
    for name, array in found.items():
        module, _, kind = name.rpartition(".")
        constant = expected.get(f"{module}.weight_clip_val" if kind == "act_clip_val" else name)
        if constant is None:
            raise UserError(f"arrays that do not fit the model: 1 unexpected ({name})")
        # The shapes of counters vary between versions of PyTorch.
        counts = kind == "num_batches_tracked" and array.size == 1
        unused = naming.is_unused(name) and array.shape == constant.shape
        if not counts and not unused and not np.array_equal(np.ravel(array), np.ravel(constant)):
            raise UserError(
                f"the constant {name} differs from the one that this project computes with; is it from a"
                " modified model?"
            )


@contextmanager
def _prefixing(origin: str) -> Iterator[None]:
    """Puts the file's name in front of the message of a `UserError` that does not start with it."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith(origin):
            error.args = (f"{origin}: {error}",)
        raise


def _extended_history(raw: RawCheckpoint, name: str) -> tuple[Mapping[str, Any], ...]:
    files = [{"file": file.name, "sha256": tensor_files.sha256(file), "format": name} for file in raw.files]
    return (*(raw.document.history if raw.document else ()), *files)


def _from_flat(state: StateDict, abstract: Variables) -> Variables:
    """Undoes `flatten`, with the checks and the messages of `from_state_dict`."""
    expected = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    check_fit(state, expected)
    return jax.tree_util.tree_map_with_path(lambda path, _: state[path_name(path)], abstract)
