"""Draws the rooms of bvit_jax and the imports between them, as read from the code.

    python docs/architecture.py [--png docs/images/architecture.png]

Needs grimp (which comes with import-linter) and matplotlib, both in the extra ``test``. The order of the rooms is the
one in pyproject.toml that import-linter checks; each box has a room's name, its size and the first sentence of its
docstring. Arrows that follow from others are left out, and so is ``errors``, which every room imports.
"""

import argparse
import ast
import textwrap
import tomllib
from pathlib import Path

import grimp
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
BANDS = {  # the first room of each group, with the group's name and colour
    "cli": ("commands", "#f9dcd7"),
    "report": ("what one does\nwith a network", "#fbeecb"),
    "plan": ("how a run\nexecutes", "#dcefd5"),
    "workdir": ("what is\non disk", "#d3e8f3"),
    "augment": ("what training\nadds", "#e6dcf3"),
    "models": ("the network", "#d6defa"),
    "config": ("settings", "#e9e9e9"),
}
WIDTH, HEIGHT, DOWN, LANE = 9.4, 0.5, 0.74, 0.3  # of a box; from box to box; between vertical lines; in inches
INK = "#3d4b5c"
SHADES = ["#b3432b", "#2f6f9f", "#5a8f3c", "#7a4fa3", "#b07d12", "#1f8a8a", "#a33a6b"]
ARROW = {"arrowstyle": "-|>", "color": INK, "lw": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}


def order() -> list[str]:
    """Returns the rooms from top to bottom, in the order that import-linter checks."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    return [room for row in layers for room in row.replace("|", ":").replace(" ", "").split(":") if room != "errors"]


def imports(rooms: list[str]) -> dict[str, set[str]]:
    """Returns the rooms that each room imports; ``__main__`` files are commands and left out."""
    graph = grimp.build_graph("bvit_jax", cache_dir=None)
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for module in graph.modules:
        room = (module.split(".") + [""])[1]
        if room in found and not module.endswith("__main__"):
            targets = {(name.split(".") + [""])[1] for name in graph.find_modules_directly_imported_by(module)}
            found[room] |= targets & found.keys() - {room}
    return found


def reached(room: str, found: dict[str, set[str]]) -> set[str]:
    """Returns all rooms that a room imports, directly or through others."""
    return found[room].union(*(reached(target, found) for target in found[room]))


def describe(room: str) -> tuple[str, str]:
    """Returns the size of a room in words and the first sentence of its docstring."""
    path = ROOT / "bvit_jax" / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    text = ast.get_docstring(ast.parse(files[0].read_text())) or ""
    lines = sum(len(file.read_text().splitlines()) for file in files)
    sentence = " ".join(text.split("\n\n")[0].split()).replace("`", "").split(". ")[0].rstrip(".:")
    return f"{len(files)} files, {lines:,} lines" if path.is_dir() else f"{lines:,} lines", sentence


def lanes(spans: dict[str, list[int]]) -> dict[str, int]:
    """Returns a vertical line for each room that is reached from afar, so that no two share one at the same height."""
    taken: list[list[int]] = []
    found = {}
    for room, rows in sorted(spans.items(), key=lambda item: (item[1][-1] - item[1][0], item[1])):
        free = (lane for lane, rest in enumerate(taken) if not set(rest) & set(range(rows[0], rows[-1] + 1)))
        found[room] = next(free, len(taken))
        taken.extend([[]] if found[room] == len(taken) else [])
        taken[found[room]].extend(range(rows[0], rows[-1] + 1))
    return found


def draw(png: Path) -> None:
    """Writes the picture."""
    rooms = order()
    found = imports(rooms)
    row = {room: number for number, room in enumerate(rooms)}
    spans: dict[str, list[int]] = {}  # of each room: the rows of those that import it, and its own
    figure, axes = pyplot.subplots(figsize=(14.4, DOWN * len(rooms)))
    colour = ""
    for room, y in ((room, -DOWN * row[room]) for room in rooms):
        label, colour = BANDS.get(room, ("", colour))
        axes.axhspan(y - DOWN / 2, y + DOWN / 2, color=colour, alpha=0.55, lw=0, zorder=0)
        axes.text(-2.0, y + 0.2, label, size=12, color=INK, va="top", weight="bold")
        size, sentence = describe(room)
        box = FancyBboxPatch(
            (0, y - HEIGHT / 2), WIDTH, HEIGHT, "round,pad=0,rounding_size=0.1", fc="white", ec=INK, zorder=2
        )
        axes.add_patch(box)
        axes.text(0.15, y, room, weight="bold", size=13, va="center")
        axes.text(1.4, y, textwrap.shorten(sentence, 82, placeholder=" …"), size=10, va="center")
        axes.text(WIDTH - 0.12, y, size, size=9, ha="right", va="center", color="#777777")
        implied = set().union(*(reached(target, found) for target in found[room]))
        for target in found[room] - implied:
            if row[target] == row[room] + 1:
                axes.annotate("", (0.75, y - DOWN + HEIGHT / 2), (0.75, y - HEIGHT / 2), arrowprops=ARROW)
            else:
                spans.setdefault(target, []).append(row[room])
    spans = {room: [*sorted(rows), row[room]] for room, rows in spans.items()}
    place = {room: WIDTH + LANE * (lane + 1.4) for room, lane in lanes(spans).items()}
    for (room, (*importers, own)), shade in zip(sorted(spans.items(), key=lambda item: place[item[0]]), SHADES * 3):
        x, y = place[room], -DOWN * own - 0.16
        starts = []
        for number in importers:  # outer lines leave above inner ones, so that they cross less
            inner = [place[other] for other, rows in spans.items() if number in rows[:-1] and place[other] < x]
            starts.append(-DOWN * number - 0.04 + 0.055 * len(inner))
            axes.plot([WIDTH, x], [starts[-1]] * 2, color=shade, lw=1.5, zorder=1)
        axes.plot([x, x], [starts[0], y], color=shade, lw=1.5, zorder=1, solid_capstyle="round")
        axes.plot([x] * len(starts[1:]), starts[1:], "o", color=shade, ms=3.5)
        axes.annotate("", (WIDTH, y), (x, y), arrowprops=ARROW | {"color": shade, "lw": 1.5})
    axes.set(xlim=(-2.15, max(place.values()) + 0.3), ylim=(-DOWN * (len(rooms) - 0.5), DOWN * 0.5))
    axes.set_position((0, 0, 1, 1))
    axes.axis("off")
    figure.savefig(png, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=ROOT / "docs/images/architecture.png")
    draw(parser.parse_args().png)
