"""Training curves: what is read from damaged and unfinished runs, the picture, the page."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from bvit_jax.report import curves_page
from bvit_jax.report.__main__ import main
from bvit_jax.report.curves import Curve, Run, curves, distinct_labels, isolated, panels, read_runs, series
from bvit_jax.report.curves_page import curves_html, differing_settings, final_figures, thinned, ticks

VOID = {"meta", "input", "br", "img"}


class Page(HTMLParser):
    """Checks that elements are nested, and keeps what they are and hold."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write_run(path: Path, lines: list, settings: dict | None = None, end: str = "") -> Path:
    path.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + end)
    if settings is not None:
        (path / "config.json").write_text(json.dumps(settings))
    return path


def training_lines(count: int = 3, **more: object) -> list[dict]:
    return [
        {"step": s, "epoch": s / 2, "loss": 1 / s, "learning_rate": 0.1, "images_per_second": 10.0 * s} | more
        for s in range(1, count + 1)
    ]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["curves", *map(str, arguments)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# --- reading -----------------------------------------------------------------------------------


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "x/b/run", "other"):
        write_run(tmp_path / name, training_lines())
    paths = [tmp_path / name for name in ("a/run", "b/run", "x/b/run", "other", "a/../a/run")]
    labels = [run.label for run in read_runs(paths)]
    assert labels[0] == "a/run"
    assert labels[1:3] == [f"{tmp_path.name}/b/run", "x/b/run"]
    assert labels[3:] == ["other"]  # and the first one once
    assert distinct_labels([Path("/r"), Path("/a/r")]) == ["//r", "a/r"]


def test_a_line_in_the_writing_is_left_out(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", training_lines(), {"epochs": 2}, '{"step": 4, "lo')])
    assert [line["step"] for line in run.lines] == [1, 2, 3]
    assert len(run.notes) == 1
    assert "not whole" in run.notes[0]
    (whole,) = read_runs([write_run(tmp_path / "whole", training_lines(), {}, '{"step": 4}')])
    assert whole.lines[-1] == {"step": 4}
    assert whole.notes == ("config.json cannot be read, so that the settings are not known",)


@pytest.mark.parametrize(
    "row", ["nonsense", "[1]", '{"loss": 1}', '{"step": "1"}', '{"step": 1, "loss": "low"}', "[" * 5000, "\0"]
)
def test_a_damaged_line_is_named(tmp_path: Path, row: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", training_lines(), end=row + "\n" + '{"step": 9}\n')
    assert f"{run / 'metrics.jsonl'} is damaged: line 4 is no JSON object" in error_of(capsys, run)
    last = write_run(tmp_path / "last", training_lines(), end=row + "\n")  # whole, and damaged
    assert "is damaged: line 4" in error_of(capsys, last)


@pytest.mark.parametrize("text", ["", "\n\n", '{"step": 1'])
def test_nothing_logged_yet(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [], end=text)
    assert "metrics.jsonl is empty: the run has not logged anything yet" in error_of(capsys, run)


def test_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", training_lines())
    (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    assert "line 2" in error_of(capsys, run)


def test_values_that_were_not_finite_are_gaps() -> None:
    lines = [{"step": s, "loss": v} for s, v in enumerate([1.0, None, 3.0, math.inf, 5.0, 6.0])]
    steps, values = series([*lines, {"step": 7}], "loss", 2)
    assert steps == list(range(6))
    assert [v for v in values if not math.isnan(v)] == [2, 6, 10, 12]
    assert [i for i, v in enumerate(values) if math.isnan(v)] == [1, 3]
    assert isolated(values) == [0, 2]


# --- what is drawn -----------------------------------------------------------------------------


def test_the_loss_has_its_terms_and_accuracy_its_kinds() -> None:
    lines = training_lines(label_loss=0.5, distillation_loss=0.25, ranking_loss=0.1)
    lines.append({"step": 3, "eval_top1": 0.5, "eval_top5": 0.75, "eval_loss": 2.0, "eval_ema_top1": 0.625})
    runs = [Run("a", lines), Run("b", training_lines())]
    drawn = [curves(panel, runs) for panel in panels(runs)]
    loss = {(c.run, c.name): c.values for c in drawn[0]}
    assert loss[0, "distillation loss"] == [0.25] * 3
    assert loss[1, "loss"] == [1, 1 / 2, 1 / 3]
    assert len(loss) == 5
    assert len({c.dash for c in drawn[0]}) == 4
    accuracy = {c.name: c.values for c in drawn[1]}
    assert accuracy == {"top-1": [50], "top-5": [75], "top-1, average weights": [62.5]}
    assert [c.values for c in drawn[3]] == [[10, 20, 30]] * 2


def test_thinning_keeps_peaks_and_gaps() -> None:
    values = [float(i % 7) for i in range(5000)]
    values[1234], values[4321], values[2000] = 100.0, -100.0, math.nan
    curve = Curve(0, "loss", "solid", list(range(5000)), values)
    thin = thinned(curve, 200)
    assert len(thin.steps) <= 210
    points = dict(zip(thin.steps, thin.values, strict=True))
    assert points[1234] == 100
    assert points[4321] == -100
    assert math.isnan(points[2000])
    assert {0, 4999} <= points.keys()
    assert all(values[s] == v for s, v in points.items() if s != 2000)
    assert thinned(curve, 5000) is curve


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(22, 440) == [100, 200, 300, 400]
    assert [round(t, 12) for t in ticks(0.0, 0.002)] == [0, 0.0005, 0.001, 0.0015, 0.002]
    assert [round(t, 12) for t in ticks(-0.31, 0.29, 3)] == [-0.2, 0, 0.2]


def test_last_figures() -> None:
    lines = training_lines(5)
    lines[-1] |= {"loss": None, "seconds_left": 3700.0}
    for step, top1 in ((1, 0.25), (2, 0.75), (3, None), (4, 0.5)):
        lines.append({"step": step, "eval_top1": top1, "eval_top5": 1.0, "eval_loss": 1.5})
    row = dict(zip(curves_page.FIGURES, final_figures(Run("a", lines)), strict=True))
    assert row == {
        "run": "a",
        "step": "5",
        "epoch": "2.5",
        "loss": "not finite",
        "top-1 (%)": "50.00",
        "best top-1 (%)": "75.00",
        "at step": "2",
        "top-5 (%)": "100.00",
        "held-out loss": "1.5000",
        "median images/s": "30.0",
        "time left": "1 h 2 min",
    }
    assert final_figures(Run("b", [{"step": 3}])) == ["b", "3", *["–"] * 9]


def test_settings_that_differ(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / str(i), training_lines(), {"epochs": 3, "optim": {"rate": i, "b": [1]}} | more)
        for i, more in enumerate([{}, {"new": None}])
    ]
    assert differing_settings(read_runs(paths)) == {"optim.rate": ["0", "1"], "new": ["–", "null"]}


# --- picture and page --------------------------------------------------------------------------

NAMES = ("<script>alert(1)</script>", '$x$ & "y"', "_hidden", "Über 漢字\nline")


def strange_runs(directory: Path) -> list[Path]:
    names = [name.replace("/", "∕") for name in NAMES]
    for i, name in enumerate(names):
        lines = [*training_lines(), {"step": 3, "eval_top1": 0.25 * i}]
        write_run(directory / name, lines, {"seed": i, "note": "</script><b>"})
    return [directory / name for name in names]


def test_the_picture_of_strange_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "curves.png"
    assert main(["curves", *map(str, strange_runs(tmp_path)), f"--output={output}"]) == 0
    with Image.open(output) as image:
        assert image.width > 1000


def test_the_page_is_whole_and_names_are_text(tmp_path: Path) -> None:
    output = tmp_path / "curves.html"
    paths = strange_runs(tmp_path)
    assert main(["curves", *map(str, paths), f"--output={output}"]) == 0
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"(src|href|url|@import)\s*[=(]", text)
    assert len(page.all("script")) == 2  # the data and the program, none from a name
    assert not page.all("b")
    cells = page.texts["td"]
    assert all(path.name in cells for path in paths)
    data = json.loads(page.texts["script"][0])
    assert data["runs"] == [path.name for path in paths]
    assert [curve["values"] for curve in data["panels"][1]["curves"]] == [[0.0], [25.0], [50.0], [75.0]]


def test_the_page_draws_the_values() -> None:
    lines = [{"step": s, "loss": v} for s, v in ((0, 0.0), (10, 1.0), (20, None), (30, 2.0), (40, 4.0))]
    page = Page(curves_html([Run("a", [*lines, {"step": 50, "loss": None}, {"step": 60, "loss": 3.0}])]))
    pieces = [
        [tuple(map(float, point.split(","))) for point in (line["points"] or "").split()]
        for line in page.all("polyline")
    ]
    assert [len(piece) for piece in pieces] == [2, 2]  # apart at the gap
    c = curves_page
    assert [x for piece in pieces for x, _ in piece] == pytest.approx(
        [c.LEFT + s / 60 * (c.WIDTH - c.LEFT - c.RIGHT) for s in (0, 10, 30, 40)], abs=0.06
    )
    (y0, y1), (y2, y4) = ([y for _, y in piece] for piece in pieces)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y2 - y4 == pytest.approx(2 * (y0 - y1), abs=0.3)
    assert len(page.all("circle")) == 1  # the last value, which no line reaches
    assert page.texts["text"].count("none logged") == 3


def test_one_point_one_run_and_only_gaps() -> None:
    for lines in ([{"step": 5, "loss": 1.0}], [{"step": 5, "loss": None}], [{"step": 0}]):
        page = Page(curves_html([Run("a", lines)]))
        assert "Settings in which the runs differ" not in page.texts["h2"]


def test_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", training_lines())
    monkeypatch.chdir(tmp_path)
    assert main(["curves", str(run), "--output=both"]) == 0
    assert (tmp_path / "curves.png").exists()
    Page((tmp_path / "curves.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["no/such.png", "no/such.html", "curves.mp3"])
def test_an_output_that_cannot_be_written(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", training_lines())
    assert "cannot write" in error_of(capsys, run, f"--output={tmp_path / name}")
