"""What lets parts of the package run where only some of its dependencies are installed.

`lazily` imports the public names of a package when they are first used, so that one of its files does not
cost the imports of all others; `shapes` has jaxtyping's types where jaxtyping is installed. A packed model
runs with JAX, NumPy, safetensors and Pillow alone. Imports nothing of the package.
"""

import ast
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazily(package: str) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package whose public names are imported when they are first used.

    Args:
      package: ``__name__`` of the package. The names are those that its ``__init__`` imports under
        ``if TYPE_CHECKING:``, where type checkers find them too.
    """
    module = sys.modules[package]

    @functools.cache
    def homes() -> dict[str, tuple[str, str]]:
        return _homes(Path(str(module.__file__)).read_text(encoding="utf-8"))

    def __getattr__(name: str) -> Any:
        if name.startswith("__") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, attribute = homes()[name]
        if home == package:  # one of its own files or rooms
            return importlib.import_module(f"{home}.{attribute}")
        value = getattr(importlib.import_module(home), attribute)
        setattr(module, name, value)
        return value

    return __getattr__


def _homes(source: str) -> dict[str, tuple[str, str]]:
    """Returns the module of each name that a source imports for type checkers, and its name there."""
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names
    }
