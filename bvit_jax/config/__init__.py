"""The settings of a run: declared once with default, range and documentation, checked, written and read.

`settings` declares them, `values` defines what each accepts, `files` saves and loads them. Knows no models.
"""

from bvit_jax.config.files import load, save
from bvit_jax.config.settings import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SECTIONS,
    SETTINGS,
    black_borders,
    check,
    check_section,
    default_config,
    eval_resize,
    settings_of,
    validate,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SECTIONS",
    "SETTINGS",
    "black_borders",
    "check",
    "check_section",
    "default_config",
    "eval_resize",
    "load",
    "save",
    "settings_of",
    "validate",
]
