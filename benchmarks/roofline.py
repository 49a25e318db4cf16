"""Draws what `train_step.py` found against the ceilings of its machine: a roofline.

    python -m benchmarks.train_step --model binaryvit --batch 8 --reference ~/BinaryViT --json found.json
    python -m benchmarks.roofline found.json --png docs/images/roofline.png

Needs matplotlib (``pip install "bvit_jax[report]"``). Lines are the measured ceilings: bandwidth, rising, and
products by dtype, level. Each step of each side is a point: to the right, FLOPs over the least bytes, both by
the arithmetic count; upwards, the FLOP/s that it reached. Points that would lie on one vertical are moved
apart by a few per cent. The bar above a point is its floor, the least time of that step on this machine
(`floor.py`): the distance of the two is what is left to gain. A floor lies below the lines where the products
of a step are of several kinds.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.floor import bandwidth, best_rate, format_rate
from bvit_jax.errors import UserError, nearest

MARKERS = {"forward": "o", "evaluation": "s", "training": "^"}
PRODUCTS = {"float32": "-", "bfloat16": "--", "int8": ":", "binary": "-."}
APART = 1.05
PIXELS_PER_INCH = 110


class Point(NamedTuple):
    """A kind of step of a side.

    Attributes:
      side, kind: which.
      intensity: FLOPs over least bytes, as drawn.
      reached: FLOP/s.
      floor: FLOP/s of the least time.
    """

    side: str
    kind: str
    intensity: float
    reached: float
    floor: float


def read(file: Path) -> dict[str, Any]:
    """Returns a report of `train_step.py`.

    Raises:
      UserError: the file is missing, is no such report, or has no ceilings.
    """
    try:
        report = json.loads(file.read_text())
        has_ceilings = bool(report["ceilings"] and report["runs"])
    except OSError as error:
        raise UserError(f"FILE is {file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"FILE is {file}: no report; expected what train_step.py --json writes") from error
    if not has_ceilings:
        raise UserError(f"FILE is {file}: it has no ceilings; run train_step.py without --ceilings-scale 0")
    return report


def run_of(report: Mapping[str, Any], batch: int | None) -> dict[str, Any]:
    """Returns the run of a batch size, by default the first.

    Raises:
      UserError: there is none of that size.
    """
    runs = {run["batch"]: run for run in report["runs"]}
    if batch is None:
        return report["runs"][0]
    if batch not in runs:
        raise UserError(f"--batch is {batch}" + nearest(str(batch), map(str, runs)))
    return runs[batch]


def points(run: Mapping[str, Any]) -> Iterator[Point]:
    """Yields the points of a run, those of the same intensity moved apart."""
    taken: Counter[float] = Counter()
    for name, side in run["sides"].items():
        for kind, found in side["achieved"].items():
            intensity = found["flops"] / found["least_bytes"]
            moved = intensity * APART ** taken[intensity]
            taken[intensity] += 1
            yield Point(
                name,
                kind,
                moved,
                found["flops_per_second"],
                found["flops"] / found["floor_seconds"],
            )


def draw(report: Mapping[str, Any], run: Mapping[str, Any], path: Path) -> None:
    """Draws a run against the ceilings of its machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    ceilings, found = report["ceilings"], list(points(run))
    highest = max(best_rate(rounds) for rounds in ceilings["operations_per_second"].values())
    figure, axis = plt.subplots(figsize=(8.2, 5.2), layout="constrained")
    _draw_ceilings(axis, ceilings, [point.intensity for point in found])
    sides = list(dict.fromkeys(point.side for point in found))
    kinds = list(dict.fromkeys(point.kind for point in found))
    colors = {side: f"C{i}" for i, side in enumerate(sides)}
    for point in found:
        _draw_point(axis, point, colors[point.side])
    axis.set(xlabel="FLOPs per byte, both counted (least bytes)", ylabel="FLOP/s")
    axis.set_ylim(min(point.reached for point in found) / 2, highest * 1.8)
    axis.grid(alpha=0.25)
    title = f"{report['model']}, batch {run['batch']}, {ceilings['device']}"
    cpu = report["machine"]["cpu"] if ceilings["device"] == "cpu" else ""
    axis.set_title(f"{title} ({cpu}, {report['machine']['cores']} cores)" if cpu else title, fontsize=10)
    handles = [Line2D([], [], color=colors[side], lw=4, label=_label(side, run)) for side in sides]
    handles += [Line2D([], [], color="0.3", marker=MARKERS[kind], ls="", ms=6, label=kind) for kind in kinds]
    handles.append(Line2D([], [], color="0.3", marker="_", ls="", ms=12, mew=1.8, label="floor"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=PIXELS_PER_INCH)
    plt.close(figure)


def _draw_ceilings(axis: Any, ceilings: Mapping[str, Any], intensities: Sequence[float]) -> None:
    """Draws the lines of memory and products, from left of all points to right of them."""
    rate = bandwidth(ceilings)
    rates = {name: best_rate(rounds) for name, rounds in ceilings["operations_per_second"].items()}
    left = min(*intensities, min(rates.values()) / rate) / 3
    right = max(*intensities, max(rates.values()) / rate) * 4
    highest = max(rates.values()) / rate
    text = {"textcoords": "offset points", "fontsize": 8, "color": "0.35"}
    axis.set(xscale="log", yscale="log", xlim=(left, right))
    axis.plot([left, highest], [left * rate, highest * rate], color="0.35", lw=1.4)
    start = (left * 1.15, left * 1.15 * rate)
    axis.annotate(f"memory {format_rate(rate)}B/s", start, xytext=(4, -6), va="top", **text)
    for i, (name, of_dtype) in enumerate(sorted(rates.items(), key=lambda item: item[1])):
        axis.plot([of_dtype / rate, right], [of_dtype] * 2, PRODUCTS.get(name, "-"), color="0.35", lw=1.2)
        at_left = i % 2  # neighbours may be too close for one label above the other
        axis.annotate(
            f"{name} products {format_rate(of_dtype)}op/s",
            (highest if at_left else right, of_dtype),
            xytext=(4 if at_left else -3, 2),
            ha="left" if at_left else "right",
            **text,
        )


def _draw_point(axis: Any, point: Point, color: str) -> None:
    axis.plot([point.intensity] * 2, [point.reached, point.floor], color=color, lw=0.7, alpha=0.5)
    axis.plot(point.intensity, point.floor, "_", ms=13, mew=1.8, color=color)
    axis.plot(point.intensity, point.reached, MARKERS[point.kind], ms=7, color=color, mec="white", mew=0.6)


def _label(side: str, run: Mapping[str, Any]) -> str:
    dtype = run["sides"][side]["dtype"]
    return side if dtype in side else f"{side}, {dtype}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description="Draws what train_step.py found against the ceilings of its machine.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what train_step.py --json wrote")
    parser.add_argument("--png", type=Path, required=True, metavar="FILE", help="where to draw it")
    parser.add_argument("--batch", type=int, metavar="N", help="of several in the file (the first)")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.png.absolute().parent.is_dir():
            raise UserError(f"--png is {arguments.png}: its directory does not exist")
        report = read(arguments.file)
        draw(report, run_of(report, arguments.batch), arguments.png)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
