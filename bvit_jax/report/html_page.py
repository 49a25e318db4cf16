"""HTML pages that need nothing but themselves: no network, no other files but pictures beside them."""

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from bvit_jax.errors import UserError

# The browser itself then refuses to load anything else.
POLICY = "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, body: str, *, script: str = "") -> str:
    """Returns a page with the style of all reports; ``title`` is text, ``body`` is HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{asset('page.css')}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}{script}</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], attributes: Sequence[str] = ()) -> str:
    """Returns a table of texts; ``attributes`` are HTML, one a row."""
    first = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = [
        f"<tr {extra}>".replace(" >", ">") + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>"
        for row, extra in zip(rows, attributes or [""] * len(rows), strict=True)
    ]
    return (
        f"<table>\n<thead><tr>{first}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n"
    )


def embedded(values: Any) -> str:
    """Returns a JSON text that cannot end the script element it stands in; no NaN."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def asset(name: str) -> str:
    """Returns the text of a file that ships with the package."""
    return (resources.files("bvit_jax") / "assets" / "report" / name).read_text(encoding="utf-8")


def save(html: str, path: Path) -> None:
    """Writes a page; raises `UserError` if it cannot be written."""
    try:
        path.write_text(html, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; name a file in a directory that exists"
        ) from error
