"""A stand-in for ml-collections, of which models and golden files use only that keys are attributes."""

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


def provide_ml_collections() -> None:
    """Makes ``ml_collections`` importable where it is not installed."""
    if importlib.util.find_spec("ml_collections") is None:
        module = ModuleType("ml_collections")
        module.__dict__.update(ConfigDict=_nested, FieldReference=lambda default, field_type=None: default)
        sys.modules["ml_collections"] = module


def _nested(values: Any = ()) -> ConfigDict:
    config = ConfigDict()
    config.update(values)
    return config
