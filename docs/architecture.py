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
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Line

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
WIDTH, HEIGHT, ACROSS, DOWN = 3.1, 0.78, 3.35, 1.12  # of a box; from one box to the next
INK = "#46566a"


def order() -> list[list[str]]:
    """Returns the rows of rooms, top to bottom, that import-linter checks."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    return [row.replace("|", ":").replace(" ", "").split(":") for row in layers if row != "errors"]


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


def arrow(axes: pyplot.Axes, points: list[tuple[float, float]], way: float) -> None:
    """Draws a line (straight, or a cubic curve) whose head points along x by ``way``, or down at 0."""
    codes = [Line.MOVETO] + [Line.LINETO if len(points) == 2 else Line.CURVE4] * (len(points) - 1)
    axes.add_patch(PathPatch(Line(points, codes), fill=False, ec=INK, lw=1.3, zorder=1))
    x, y = points[-1]
    corners = [(-0.06, 0.15), (0.06, 0.15)] if not way else [(-0.15 * way, 0.06), (-0.15 * way, -0.06)]
    axes.add_patch(Polygon([(x, y), *((x + across, y + up) for across, up in corners)], color=INK, zorder=3))


def draw(png: Path) -> None:
    """Writes the picture."""
    rows = order()
    found = imports([room for row in rows for room in row])
    level = {room: number for number, row in enumerate(rows) for room in row}
    x = {room: ACROSS * (i - (len(row) - 1) / 2) for row in rows for i, room in enumerate(row)}
    figure, axes = pyplot.subplots(figsize=(15, len(rows) * DOWN * 0.93), layout="constrained")
    name, colour = "", ""
    for room in level:
        starts = room in BANDS
        name, colour = BANDS.get(room, (name, colour))
        if x[room] == min(x[other] for other in rows[level[room]]):
            y = -DOWN * level[room]
            axes.axhspan(y - DOWN / 2, y + DOWN / 2, color=colour, alpha=0.45, lw=0, zorder=0)
            axes.text(-7.9, y, name if starts else "", size=12, color=INK, va="center", weight="bold")
        size, sentence = describe(room)
        left, top = x[room] - WIDTH / 2, -DOWN * level[room] + HEIGHT / 2
        shape = "round,pad=0,rounding_size=0.1"
        axes.add_patch(FancyBboxPatch((left, top - HEIGHT), WIDTH, HEIGHT, shape, fc="white", ec=INK, zorder=2))
        axes.text(left + 0.1, top - 0.18, room, weight="bold", size=13, va="center")
        axes.text(left + WIDTH - 0.1, top - 0.18, size, size=8.5, ha="right", va="center", color="#666666")
        short = textwrap.fill(textwrap.shorten(sentence, 92, placeholder=" …"), 46)
        axes.text(left + 0.1, top - 0.34, short, size=9, va="top", linespacing=1.1)
    lanes = {-1: 0, 1: 0}
    for room, targets in found.items():
        for target in sorted(targets - set().union(*(reached(other, found) for other in targets)), key=level.get):
            (a, b), gap = (-DOWN * level[room], -DOWN * level[target]), level[target] - level[room]
            if gap == 1:
                shift = 0.28 * (x[target] - x[room]) / ACROSS
                arrow(axes, [(x[room] + shift, a - HEIGHT / 2), (x[target] - shift, b + HEIGHT / 2)], 0)
                continue
            side = 1 if (x[room] + x[target] or lanes[-1] - lanes[1]) >= 0 else -1
            lanes[side] += 1
            edges = [side * x[r] for row in rows[level[room] : level[target] + 1] for r in row]
            out = side * (max(edges) + WIDTH / 2 + 0.25 + 0.16 * gap)
            ends = [(x[room] + side * WIDTH / 2, a), (x[target] + side * WIDTH / 2, b)]
            arrow(axes, [ends[0], (out, a), (out, b), ends[1]], -side)
    axes.set(xlim=(-8, 7.4), ylim=(-DOWN * (len(rows) - 0.45), DOWN * 0.55), aspect="equal")
    axes.axis("off")
    figure.savefig(png, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=ROOT / "docs/images/architecture.png")
    draw(parser.parse_args().png)
