"""Saving: a model with its weights as a directory or file of any format."""

import json
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError, nearest
from bvit_jax.files.appearing import appearing, to_json, write
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
    with appearing(target) as partial:
        if target.suffix == tensor_files.SAFETENSORS_SUFFIX:
            metadata = {"format": "pt", DOCUMENT_KEY: json.dumps(values)}
            write(partial, tensor_files.encode_safetensors(state, metadata))
        elif target.suffix in tensor_files.TORCH_SUFFIXES:
            tensor_files.write_torch(partial, {"model": state, DOCUMENT_KEY: json.dumps(values)})
        else:
            partial.mkdir()
            content = tensor_files.encode_safetensors(state, {"format": "pt"})
            write(partial / WEIGHTS_FILE, content)
            write(partial / CONFIG_FILE, to_json(values))
            if file_format in FORMATS and (processor := FORMATS[file_format].processor):
                write(partial / PROCESSOR_FILE, to_json(processor(pretrained.preprocessing)))


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
