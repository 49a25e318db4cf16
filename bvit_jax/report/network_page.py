"""The HTML page of a report on a network: it loads nothing but the pictures next to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from bvit_jax import models
from bvit_jax.weights.pretrained import Pretrained

# The browser itself then refuses to load anything else.
POLICY = "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Picture:
    """One section of the page.

    Attributes:
      title: that of the section.
      text: what the picture shows, or why there is none.
      name: that of the file without its suffix, empty without a picture.
      draw: returns the matplotlib figure.
    """

    title: str
    text: str
    name: str = ""
    draw: Callable[[], Any] | None = None


def index_html(model: Pretrained, pictures: Sequence[Picture], origin: str) -> str:
    """Returns the page that shows the pictures in its own directory."""
    title = escape(f"The network of {origin}")
    style = (resources.files("bvit_jax") / "assets" / "report" / "network.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{_facts(model, origin)}{''.join(map(_section, pictures))}</body>\n</html>\n"
    )


def _section(picture: Picture) -> str:
    title, text = escape(picture.title), escape(picture.text)
    if picture.draw is None:
        return f'<h2>{title}</h2>\n<p class="note">Not drawn: {text}</p>\n'
    image = f'<img src="{picture.name}.png" alt="{title}">'
    return f"<h2>{title}</h2>\n<figure>{image}\n<figcaption>{text}</figcaption></figure>\n"


def _facts(model: Pretrained, origin: str) -> str:
    config = model.config
    settings = ", ".join(f"{key} {config[key]}" for key in ("width", "depth", "num_heads", "patch_size"))
    sources = [f"{e['file']} ({e.get('weights', e['format'])})" for e in reversed(model.history)]
    rows = {
        "read from": origin,
        "weights": " ← ".join(sources),
        "model": f"{config.name}: {settings}, {config.image_size}×{config.image_size} pixels",
        "parameters": f"{models.num_params(model.variables['params']):,}",
    }
    cells = [f"<tr><td>{name}</td><td>{escape(value)}</td></tr>\n" for name, value in rows.items() if value]
    return f"<table>\n<tbody>\n{''.join(cells)}</tbody>\n</table>\n"
