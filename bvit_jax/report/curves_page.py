"""The training curves of runs as one HTML file: diagrams, final figures, and what the runs were told."""

import json
import math
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bvit_jax.report import html_page
from bvit_jax.report.curves import CYCLE, Curve, Panel, Run, curves, isolated, panels, series

# Those of matplotlib's "tab10", so that a run has one colour in both forms.
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
WIDTH, HEIGHT = 540, 320  # of a diagram; within it the frame of the curves
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 44, 40
MAX_POINTS = 2000  # of a curve: more than a diagram has pixels
DASHES = {"solid": "", "dashed": "7 4", "dotted": "2 3", "dashdot": "8 3 2 3"}
ABSENT = "–"


def save_page(runs: Sequence[Run], path: Path) -> None:
    """Writes the page of `curves_html`; raises `UserError` if it cannot be written."""
    html_page.save(curves_html(runs), path)


def curves_html(runs: Sequence[Run]) -> str:
    """Returns a page with the curves of runs, a table of their last figures and one of their settings.

    The settings are those in which the runs differ. Everything is in the page; a script in it reads values
    out under the pointer and hides runs.
    """
    drawn = [(panel, [thinned(curve) for curve in curves(panel, runs)]) for panel in panels(runs)]
    steps = _range([step for _, found in drawn for curve in found for step in curve.steps], margin=0.0)
    diagrams = [_Diagram(panel, found, steps) for panel, found in drawn]
    body = [
        '<p class="runs">',
        *(_checkbox(i, run) for i, run in enumerate(runs)),
        "</p>\n",
        *(f'<p class="note">{escape(run.label)}: {escape(n)}.</p>\n' for run in runs for n in run.notes),
        '<div class="panels">\n',
        *(diagram.html() for diagram in diagrams),
        "</div>\n<h2>Last figures</h2>\n",
        html_page.table(
            FIGURES, [final_figures(run) for run in runs], [f'data-of="{i}"' for i in range(len(runs))]
        ),
        _settings_table(runs),
    ]
    data = {"runs": [run.label for run in runs], "panels": [diagram.data() for diagram in diagrams]}
    script = (
        f'<script type="application/json" id="data">{html_page.embedded(data)}</script>\n'
        f"<script>\n{html_page.asset('curves.js')}</script>\n"
    )
    return html_page.page("Training curves", "".join(body), script=script)


def _checkbox(index: int, run: Run) -> str:
    colour = COLOURS[index % CYCLE]
    return (
        f'<label><input type="checkbox" checked data-run="{index}"> '
        f'<span class="swatch" style="background:{colour}"></span>{escape(run.label)}</label>\n'
    )


# --- tables ------------------------------------------------------------------------------------

FIGURES = (
    *("run", "step", "epoch", "loss", "top-1 (%)", "best top-1 (%)", "at step", "top-5 (%)"),
    *("held-out loss", "median images/s", "time left"),
)


def final_figures(run: Run) -> list[str]:
    """Returns the last values that a run has logged, in the order of `FIGURES`."""
    last = {
        name: series(run.lines, name) for name in ("epoch", "loss", "eval_top5", "eval_loss", "seconds_left")
    }
    steps, top1 = series(run.lines, "eval_top1", 100)
    best = max((x for x in top1 if not math.isnan(x)), default=None)
    speeds = [x for x in series(run.lines, "images_per_second")[1] if not math.isnan(x)]
    return [
        run.label,
        str(max(line["step"] for line in run.lines)),
        _shown(last["epoch"][1][-1:], "{:.4g}"),
        _shown(last["loss"][1][-1:], "{:.4f}"),
        _shown(top1[-1:], "{:.2f}"),
        ABSENT if best is None else f"{best:.2f}",
        ABSENT if best is None else str(steps[top1.index(best)]),
        _shown([100 * x for x in last["eval_top5"][1][-1:]], "{:.2f}"),
        _shown(last["eval_loss"][1][-1:], "{:.4f}"),
        f"{statistics.median(speeds):.1f}" if speeds else ABSENT,
        _time_left(last["seconds_left"][1][-1:]),
    ]


def _shown(values: Sequence[float], form: str) -> str:
    if not values:
        return ABSENT
    return "not finite" if math.isnan(values[0]) else form.format(values[0])


def _time_left(values: Sequence[float]) -> str:
    if not values or math.isnan(values[0]):
        return ABSENT
    minutes = math.ceil(values[0] / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes else "none"


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Returns the settings in which runs differ, as JSON texts, one a run."""
    names = sorted({name for run in runs for name in run.settings})
    rows = {name: [_setting(run, name) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _setting(run: Run, name: str) -> str:
    return json.dumps(run.settings[name], ensure_ascii=False) if name in run.settings else ABSENT


def _settings_table(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    title = "<h2>Settings in which the runs differ</h2>\n"
    rows = [[name, *values] for name, values in differing_settings(runs).items()]
    if not rows:
        return title + '<p class="note">None.</p>\n'
    return title + html_page.table(["setting", *(run.label for run in runs)], rows)


# --- diagrams ----------------------------------------------------------------------------------


def thinned(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """Returns a curve of at most about ``limit`` points, the least and the largest of each stretch.

    A peak stays where it is and as high as it is, and a gap stays a gap.
    """
    count = len(curve.steps)
    if count <= limit:
        return curve
    size = -(-2 * count // limit)
    kept: set[int] = {0, count - 1}
    for start in range(0, count, size):
        stretch = range(start, min(start + size, count))
        finite = [i for i in stretch if not math.isnan(curve.values[i])]
        kept.update(
            [next(i for i in stretch if math.isnan(curve.values[i]))] if len(finite) < len(stretch) else []
        )
        if finite:
            kept.update(
                (min(finite, key=curve.values.__getitem__), max(finite, key=curve.values.__getitem__))
            )
    chosen = sorted(kept)
    return Curve(
        curve.run, curve.name, curve.dash, [curve.steps[i] for i in chosen], [curve.values[i] for i in chosen]
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns the multiples of 1, 2 or 5 times a power of ten in an interval, about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _Diagram:
    """Curves in a frame, as SVG and as the data that the script reads."""

    def __init__(self, panel: Panel, drawn: Sequence[Curve], steps: tuple[float, float]) -> None:
        self.panel, self.curves, self.x = panel, drawn, steps
        values = [v for curve in drawn for v in curve.values if not math.isnan(v)]
        low, high = _range(values, margin=0.04)
        self.y = (min(0.0, *values), high) if values and panel.from_zero else (low, high)

    def data(self) -> dict[str, Any]:
        """Returns what the script reads."""
        return {
            "left": LEFT,
            "width": WIDTH - LEFT - RIGHT,
            "first": self.x[0],
            "last": self.x[1],
            "curves": [
                {
                    "run": curve.run,
                    "name": curve.name,
                    "steps": curve.steps,
                    "values": [None if math.isnan(v) else float(f"{v:.6g}") for v in curve.values],
                }
                for curve in self.curves
            ],
        }

    def html(self) -> str:
        """Returns the diagram with an empty place for what the script reads out."""
        parts = [
            f'<text class="title" x="{LEFT}" y="16">{escape(self.panel.title)}</text>',
            *self._legend(),
            *self._axes(),
            *(self._curve(curve) for curve in self.curves),
            f'<line class="cursor" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"></line>',
        ]
        if not self.curves:
            parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">none logged</text>')
        inner = "\n".join(parts)
        return (
            f'<div class="panel"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n{inner}\n</svg>'
            '<div class="readout"></div></div>\n'
        )

    def _at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    def _legend(self) -> list[str]:
        styles = {curve.name: curve.dash for curve in self.curves}
        parts, x = [], LEFT
        for name, dash in styles.items() if len(styles) > 1 else ():
            parts.append(
                f'<line x1="{x}" x2="{x + 26}" y1="32" y2="32" stroke="#444" stroke-width="1.6"'
                f' stroke-dasharray="{DASHES[dash]}"></line><text x="{x + 31}" y="36">{escape(name)}</text>'
            )
            x += 50 + 7 * len(name)
        return parts

    def _axes(self) -> list[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = []
        for value in ticks(*self.x):
            x = self._at(value, self.y[0])[0]
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"></line>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
        for value in ticks(*self.y, count=7):
            y = self._at(self.x[0], value)[1]
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"></line>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        frame = f'x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"'
        parts.append(f'<rect class="frame" {frame}></rect>')
        parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
        return parts

    def _curve(self, curve: Curve) -> str:
        colour = COLOURS[curve.run % CYCLE]
        finite = [i for i, value in enumerate(curve.values) if not math.isnan(value)]
        at = {i: self._at(curve.steps[i], curve.values[i]) for i in finite}
        dash = f' stroke-dasharray="{DASHES[curve.dash]}"' if DASHES[curve.dash] else ""
        parts = [
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in piece)}"{dash}></polyline>'
            for piece in _pieces(curve, at)
        ]
        marked = finite if self.panel.points else isolated(curve.values)
        parts += [
            f'<circle cx="{at[i][0]:.1f}" cy="{at[i][1]:.1f}" r="2.6" fill="{colour}"></circle>'
            for i in marked
        ]
        return f'<g data-of="{curve.run}" stroke="{colour}">' + "".join(parts) + "</g>"


def _pieces(curve: Curve, at: dict[int, tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Returns the places of a curve's points, apart at every gap."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for i in range(len(curve.steps)):
        if i in at:
            pieces[-1].append(at[i])
        else:
            pieces.append([])
    return [piece for piece in pieces if len(piece) > 1]


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Returns an interval that holds the values with a margin, not empty whatever they are."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 1.0
        return low - room, high + room
    room = margin * (high - low)
    return low - room, high + room
