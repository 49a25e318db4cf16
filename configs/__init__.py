"""The experiments, one per file with a function ``get_config``.

``bvit train --config=NAME`` takes one by name. The package `bvit_jax.configs` is this directory;
``configs.digits`` is imported when it is first used.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
