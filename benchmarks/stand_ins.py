"""Stand-ins for two packages that a bare GPU machine may lack.

Models and golden files use of ml-collections only that keys are attributes, and of jaxtyping the annotations.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


class ConfigDict(dict[str, Any]):
    """A dictionary whose keys are attributes too."""

    def update(self, *values: Any, **named: Any) -> None:
        """Takes values, those that are dictionaries as dictionaries of this kind."""
        for key, value in dict(*values, **named).items():
            self[key] = _nested(value) if isinstance(value, dict) else value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class Annotation:
    """The type of an array or a tree, without its dtype and shape."""

    def __class_getitem__(cls, item: Any) -> Any:
        return item[0] if isinstance(item, tuple) else Any


def provide() -> None:
    """Makes ``ml_collections`` and ``jaxtyping`` importable where they are not installed."""
    _provide("ml_collections", ConfigDict=_nested, FieldReference=lambda default, field_type=None: default)
    _provide("jaxtyping", __getattr__=_annotation)


def _annotation(name: str) -> type[Annotation]:
    if name.startswith("__"):  # what Python asks of every module
        raise AttributeError(name)
    return Annotation


def _provide(name: str, **content: Any) -> None:
    if importlib.util.find_spec(name) is None:
        module = ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module


def _nested(values: Any = ()) -> ConfigDict:
    config = ConfigDict()
    config.update(values)
    return config
