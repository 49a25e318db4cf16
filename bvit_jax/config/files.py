"""The configuration of a run as a file, and how the files of a run are written and read."""

import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bvit_jax.config.settings import default_config
from bvit_jax.errors import UserError

MAX_BYTES = 1 << 26  # of the JSON that a run reads: checksums of a large model on many hosts


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file that holds either what it held before or all of the new content; replaces a link."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file, which is made, and to no half line; it is on the disk afterwards."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o666), "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        whole = file.read() in (b"", b"\n")
        file.write(b"" if whole else b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Returns the JSON of a file of a run; raises `OSError`, or `ValueError` where it is none."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes; expected at most {MAX_BYTES}")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def save(config: ConfigDict, path: Path) -> None:
    """Writes the resolved configuration as JSON."""
    replace_file(path, (json.dumps(config.to_dict(), indent=2, default=str) + "\n").encode())


def load(path: Path) -> ConfigDict:
    """Reads a configuration written by `save`.

    Raises:
      UserError: the file is missing or is not such a configuration.
    """
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}; expected a workdir of train.py") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; expected the JSON that train.py wrote") from error
    defaults = default_config().to_dict()
    sections = {key: value for key, value in defaults.items() if isinstance(value, dict)}
    if (
        not isinstance(values, dict)
        or not {"model", "data"} <= values.keys()
        or not all(isinstance(values.get(key, {}), dict) for key in sections)
    ):
        raise UserError(f"{path} is not the configuration of a run; expected a workdir of train.py")
    # A run of an older version lacks the settings that came later; their defaults change nothing.
    filled = {key: {**value, **values.get(key, {})} for key, value in sections.items()}
    try:
        return ConfigDict(_lists_to_tuples({**defaults, **values, **filled}))
    except RecursionError as error:
        raise UserError(f"cannot read {path}: its brackets are nested too deeply") from error


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value
