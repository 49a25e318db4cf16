"""Training curves: what is read from damaged and unfinished runs, and the picture."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from bvit_jax.report.__main__ import main
from bvit_jax.report.curves import Run, curves, distinct_labels, isolated, panels, read_runs
from bvit_jax.workdir.logged import series


def write_run(path: Path, lines: list, end: str = "") -> Path:
    path.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + end)
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


def test_an_incomplete_last_line_is_skipped(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", training_lines(), '{"step": 4, "lo')])
    assert [line["step"] for line in run.lines] == [1, 2, 3]
    (whole,) = read_runs([write_run(tmp_path / "whole", training_lines(), '{"step": 4}')])
    assert whole.lines[-1] == {"step": 4}


@pytest.mark.parametrize(
    "row", ["nonsense", "[1]", '{"loss": 1}', '{"step": "1"}', '{"step": 1, "loss": "low"}', "[" * 5000, "\0"]
)
def test_a_damaged_line_is_named(tmp_path: Path, row: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", training_lines(), end=row + "\n" + '{"step": 9}\n')
    assert f"{run / 'metrics.jsonl'} is damaged: line 4 is not a JSON object" in error_of(capsys, run)
    last = write_run(tmp_path / "last", training_lines(), end=row + "\n")  # whole, and damaged
    assert "is damaged: line 4" in error_of(capsys, last)


@pytest.mark.parametrize("text", ["", "\n\n", '{"step": 1'])
def test_nothing_logged_yet(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [], end=text)
    assert "metrics.jsonl is empty: the run has not logged anything yet" in error_of(capsys, run)


def test_a_directory_without_metrics_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, tmp_path).startswith(f"error: cannot read {tmp_path}")


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


# --- the picture -------------------------------------------------------------------------------

NAMES = ("<script>alert(1)</script>", '$x$ & "y"', "_hidden", "Über 漢字\nline")


def strange_runs(directory: Path) -> list[Path]:
    names = [name.replace("/", "∕") for name in NAMES]
    for i, name in enumerate(names):
        lines = [*training_lines(), {"step": 3, "eval_top1": 0.25 * i}]
        write_run(directory / name, lines)
    return [directory / name for name in names]


@pytest.mark.slow
def test_the_picture_of_strange_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "curves.png"
    output.symlink_to(tmp_path / "somebody's.png")
    (tmp_path / "somebody's.png").touch()
    assert main(["curves", *map(str, strange_runs(tmp_path)), f"--output={output}"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    with Image.open(output) as image:
        assert image.width > 1000
    assert not (tmp_path / "somebody's.png").read_bytes()


@pytest.mark.parametrize("name", ["no/such.png", "curves.html"])
def test_an_output_that_cannot_be_written(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", training_lines())
    assert "cannot write" in error_of(capsys, run, f"--output={tmp_path / name}")
