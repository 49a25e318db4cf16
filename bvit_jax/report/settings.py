"""The tables of docs/settings.md: every setting of a run with its default, values and meaning."""

import json
from typing import Any

from bvit_jax import config
from bvit_jax.report.text import markdown

BEGIN, END = "<!-- settings: bvit report settings -->", "<!-- end of settings -->"
HEAD = ("setting", "default", "values", "meaning")


def as_markdown() -> str:
    """Returns one table per section of the configuration, between the marks that they have in the docs."""
    parts = [BEGIN, *map(_section, config.SECTIONS), END]
    return "\n\n".join(parts)


def _section(section: str) -> str:
    name = f"config.{section}".rstrip(".")
    rows = [
        (f"`{key}`", f"`{_literal(setting.default)}`", setting.values.expected, setting.doc)
        for key, setting in config.settings_of(section).items()
    ]
    title = f"## `{name}`\n\n{config.SECTIONS[section]}"
    return f"{title}\n\n{markdown(HEAD, rows)}" if rows else title


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))})"
    if isinstance(value, float):
        return f"{value:.4g}" if value != int(value) else str(value)
    return json.dumps(value) if isinstance(value, str) else repr(value)
