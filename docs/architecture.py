"""Draws the rooms of bvit_jax and the imports between them, as read from the code.

    python docs/architecture.py [--png docs/images/architecture.png]

Needs grimp (which comes with import-linter) and matplotlib, both in the extra ``test``. The order of the
rooms is the one in pyproject.toml that import-linter checks; a box has a room's name, the first sentence of
its docstring and its size. Arrows that follow from others are left out, and so are ``errors`` and
``imports``, which almost every room imports.
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
NOT_DRAWN = ("__main__", "errors", "imports")
BANDS = {  # the first room of each group, with the group's name and colour
    "cli": ("commands and\nexperiments", "#f9dcd7"),
    "report": ("what one does\nwith a network", "#fbeecb"),
    "plan": ("how a run\nexecutes", "#dcefd5"),
    "workdir": ("what is\non disk", "#d3e8f3"),
    "augment": ("what training\nadds", "#e6dcf3"),
    "models": ("the network", "#d6defa"),
    "config": ("settings\nand files", "#e9e9e9"),
}
WIDTH, HEIGHT, DOWN, LANE = 9.4, 0.5, 0.74, 0.3  # of a box; from box to box; from line to line; in inches
INK = "#3d4b5c"
SHADES = ["#b3432b", "#2f6f9f", "#5a8f3c", "#7a4fa3", "#b07d12", "#1f8a8a", "#a33a6b"]


def layers() -> list[list[str]]:
    """Returns the rows of rooms from top to bottom, in the order that import-linter checks."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    rows = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    drawn = [row for row in rows if row not in NOT_DRAWN]
    return [[room.strip() for room in row.replace("|", ":").split(":")] for row in drawn]


def imports(rooms: list[str]) -> dict[str, set[str]]:
    """Returns the rooms that each room imports; ``__main__`` files are commands and left out."""
    graph = grimp.build_graph("bvit_jax", cache_dir=None)
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for module in graph.modules:
        room = module.split(".")[1] if "." in module else ""
        if room in found and not module.endswith("__main__"):
            targets = {
                name.split(".")[1] for name in graph.find_modules_directly_imported_by(module) if "." in name
            }
            found[room] |= targets & found.keys() - {room}
    return found


def reached(room: str, found: dict[str, set[str]]) -> set[str]:
    """Returns all rooms that a room imports, directly or through others."""
    return found[room].union(*(reached(target, found) for target in found[room]))


def describe(room: str) -> tuple[str, str]:
    """Returns the first sentence of a room's docstring, and its size in words."""
    path = ROOT / "bvit_jax" / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    text = (ast.get_docstring(ast.parse(files[0].read_text())) or "").split("\n\n")[0].replace("`", "")
    sentence = textwrap.shorten(" ".join(text.split()).split(". ")[0].rstrip(".:"), 84, placeholder=" …")
    lines = sum(len(file.read_text().splitlines()) for file in files)
    return sentence, f"{len(files)} files, {lines:,} lines" if path.is_dir() else f"{lines:,} lines"


def draw(png: Path) -> None:
    """Writes the picture."""
    rows = layers()
    found = imports([room for row in rows for room in row])
    rooms, bands = [], {}
    for together in rows:  # a row may hold rooms that import each other
        ordered = sorted(together, key=lambda room: -len(found[room] & set(together)))
        rooms += ordered
        if together[0] in BANDS:
            bands[ordered[0]] = BANDS[together[0]]
    row = {room: number for number, room in enumerate(rooms)}
    figure, axes = pyplot.subplots(figsize=(14.4, DOWN * len(rooms)))
    axes.set_position((0, 0, 1, 1))
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.5, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    colour, far = "", {}  # of each room: the rows of the rooms above it that import it from afar
    for room, number in row.items():
        (label, colour), y = bands.get(room, ("", colour)), -DOWN * number
        axes.axhspan(y - DOWN / 2, y + DOWN / 2, color=colour, alpha=0.55, lw=0, zorder=0)
        shape = ((0, y - HEIGHT / 2), WIDTH, HEIGHT, "round,pad=0,rounding_size=0.1")
        axes.add_patch(FancyBboxPatch(*shape, fc="white", ec=INK, zorder=2))
        sentence, size = describe(room)
        axes.text(-2.0, y + 0.2, label, size=12, color=INK, va="top", weight="bold")
        axes.text(0.15, y, room, weight="bold", size=13, va="center")
        axes.text(1.4, y, sentence, size=10, va="center")
        axes.text(WIDTH - 0.12, y, size, size=9, ha="right", va="center", color="#777777")
        for target in found[room] - set().union(*(reached(target, found) for target in found[room])):
            if row[target] == number + 1:
                axes.annotate("", (0.75, y - DOWN + HEIGHT / 2), (0.75, y - HEIGHT / 2), arrowprops=arrow)
            else:
                far.setdefault(target, []).append(number)
    x, taken = {}, set()  # vertical lines: the short ones inside, none above another
    for room, above in sorted(far.items(), key=lambda item: row[item[0]] - item[1][0]):
        lane = next(i for i in range(99) if not taken & {(i, r) for r in range(above[0], row[room] + 1)})
        taken |= {(lane, r) for r in range(above[0], row[room] + 1)}
        x[room] = WIDTH + LANE * (lane + 1.4)
    for (room, above), shade in zip(far.items(), SHADES * len(rooms)):
        inner = {
            number: sum(number in far[other] and x[other] < x[room] for other in far) for number in above
        }
        starts = [-DOWN * number - 0.04 + 0.055 * inner[number] for number in above]
        for start in starts:
            axes.plot([WIDTH, x[room]], [start] * 2, color=shade, lw=1.5, zorder=1)
        y = -DOWN * row[room] - 0.16
        axes.plot([x[room]] * 2, [starts[0], y], color=shade, lw=1.5, zorder=1)
        axes.plot([x[room]] * len(starts[1:]), starts[1:], "o", color=shade, ms=3.5)
        axes.annotate("", (WIDTH, y), (x[room], y), arrowprops=arrow | {"color": shade})
    axes.set(xlim=(-2.15, max(x.values()) + 0.3), ylim=(-DOWN * (len(rooms) - 0.5), DOWN * 0.5))
    axes.axis("off")
    figure.savefig(png, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=ROOT / "docs/images/architecture.png")
    draw(parser.parse_args().png)
