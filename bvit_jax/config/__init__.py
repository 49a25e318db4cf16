"""The settings of a run: declared once with default, range and documentation, checked, written and read.

`settings` declares them, `values` defines what each accepts, `files` saves and loads them. Knows no models.
"""

from typing import TYPE_CHECKING

from bvit_jax.imports import lazily

if TYPE_CHECKING:
    from bvit_jax.config.files import load, save
    from bvit_jax.config.settings import (
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
    from bvit_jax.config.values import IMAGENET_MEAN, IMAGENET_STD

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

__getattr__ = lazily(__name__)
