"""The configuration of a run as a file."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bvit_jax.config.settings import default_config
from bvit_jax.errors import UserError
from bvit_jax.files import read_json, replace_file


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
