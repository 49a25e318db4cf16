"""Draws the rooms of bvit_jax and the imports between them, as read from the code.

    python docs/architecture.py [--png docs/images/architecture.png]

Needs grimp (it comes with import-linter) and matplotlib, both in the extra ``test``. Each box is a room: its name,
its files and lines, and the first sentence of its docstring. A room stands above all rooms that it imports. An arrow
that follows from others is left out, and so is ``errors``, which every room imports.
"""

import argparse
import ast
import textwrap
from collections.abc import Sequence
from pathlib import Path

import grimp
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PACKAGE = Path(__file__).parents[1] / "bvit_jax"
BANDS = {  # colour and meaning of each group of rooms
    "#fde2e4": ("commands", ("cli", "convert", "predict")),
    "#fff1cc": ("what one does with a network", ("report", "parity", "inference", "cost")),
    "#e2f0d9": ("how a run executes", ("plan", "training", "runtime")),
    "#d9ecf7": ("what is on disk", ("workdir", "weights", "data")),
    "#e8e0f5": ("what training adds", ("losses", "optim", "augment")),
    "#dfe7fd": ("the network", ("models", "layers", "binary")),
    "#eeeeee": ("settings", ("config", "errors")),
}
WIDTH, HEIGHT, ACROSS, DOWN = 3.3, 0.92, 3.75, 1.5  # of a box; distances between boxes, in inches


def room_of(module: str) -> str:
    """Returns the room that a module belongs to; the package itself and ``__main__`` files have none."""
    parts = module.split(".")
    return "" if len(parts) < 2 or parts[-1] == "__main__" or parts[1] == "__init__" else parts[1]


def imports() -> dict[str, set[str]]:
    """Returns, for each room but ``errors``, the rooms that it imports."""
    graph = grimp.build_graph("bvit_jax", cache_dir=None)
    rooms: dict[str, set[str]] = {room_of(module): set() for module in graph.modules}
    for module in graph.modules:
        targets = map(room_of, graph.find_modules_directly_imported_by(module))
        rooms[room_of(module)] |= set(targets) - {room_of(module), "errors", ""}
    return {room: targets for room, targets in rooms.items() if room not in ("", "errors")}


def below(room: str, rooms: dict[str, set[str]]) -> set[str]:
    """Returns all rooms that a room imports, directly or through others."""
    return rooms[room].union(*(below(target, rooms) for target in rooms[room]))


def floors(rooms: dict[str, set[str]]) -> dict[str, int]:
    """Returns the floor of each room: one above the highest that it imports, pulled up under its importers."""
    found: dict[str, int] = {}
    for room in sorted(rooms, key=lambda room: len(below(room, rooms))):
        found[room] = 1 + max((found[target] for target in rooms[room]), default=-1)
    return found


def places(rooms: dict[str, set[str]], floor: dict[str, int]) -> dict[str, float]:
    """Returns where each room stands on its floor: sorted by the mean place of the rooms that it touches."""
    place = {room: 0.0 for room in rooms}
    touching = {room: rooms[room] | {other for other in rooms if room in rooms[other]} for room in rooms}
    for _ in range(20):
        for level in range(max(floor.values()) + 1):
            row = sorted(room for room in rooms if floor[room] == level)
            row.sort(key=lambda room: sum(place[other] for other in touching[room]) / len(touching[room]))
            place |= {room: ACROSS * (index - (len(row) - 1) / 2) for index, room in enumerate(row)}
    return place


def describe(room: str) -> tuple[str, str]:
    """Returns the size of a room in words, and the first sentence of its docstring."""
    path = PACKAGE / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    main = path / "__init__.py" if path.is_dir() else files[0]
    sentence = (ast.get_docstring(ast.parse(main.read_text())) or "").split(".\n")[0].split(". ")[0]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    size = f"{len(files)} files, {lines:,} lines" if len(files) > 1 else f"{lines:,} lines"
    return size, textwrap.shorten(sentence.rstrip("."), 84, placeholder=" …")


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=PACKAGE.parent / "docs/images/architecture.png")
    path = parser.parse_args(argv).png
    rooms = imports()
    floor = floors(rooms)
    x = places(rooms, floor)
    y = {room: DOWN * level for room, level in floor.items()}
    width = max(x.values()) - min(x.values()) + WIDTH + 0.6
    figure, axes = pyplot.subplots(figsize=(width, max(y.values()) + HEIGHT + 1.5), layout="constrained")
    for room, targets in rooms.items():
        implied = set().union(*(below(target, rooms) for target in targets))
        for target in targets - implied:
            start, end = (x[room], y[room] - HEIGHT / 2), (x[target], y[target] + HEIGHT / 2)
            style = {"arrowstyle": "-|>", "mutation_scale": 13, "lw": 1.3, "color": "#5b6b7b", "zorder": 1}
            axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))
    for colour, (_, members) in BANDS.items():
        for room in set(members) & set(rooms):
            size, sentence = describe(room)
            corner = (x[room] - WIDTH / 2, y[room] - HEIGHT / 2)
            axes.add_patch(
                FancyBboxPatch(corner, WIDTH, HEIGHT, "round,pad=0,rounding_size=0.1", fc=colour, ec="#5b6b7b", zorder=2)
            )
            left, top = x[room] - WIDTH / 2 + 0.12, y[room] + HEIGHT / 2
            axes.text(left, top - 0.22, room, weight="bold", size=13, va="center")
            axes.text(x[room] + WIDTH / 2 - 0.12, top - 0.22, size, size=8.5, ha="right", va="center", color="#555555")
            axes.text(left, top - 0.40, textwrap.fill(sentence, 46), size=9, va="top", linespacing=1.15)
    axes.set(xlim=(min(x.values()) - WIDTH / 2 - 0.2, max(x.values()) + WIDTH / 2 + 0.2), aspect="equal")
    axes.set_ylim(-HEIGHT / 2 - 0.7, max(y.values()) + HEIGHT / 2 + 0.2)
    axes.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
