import json
import math
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import cli
from bvit_jax.ablation import runs, statistics, table
from bvit_jax.ablation.runs import Result
from bvit_jax.ablation.study import Study, load_study
from bvit_jax.configs import digits
from bvit_jax.errors import UserError

STUDY = """
from bvit_jax.ablation import Study
from bvit_jax.configs import digits

def get_study(epochs="1"):
    rows = {}
    for row, width in (("small", 8), ("+ width", 16)):
        config = rows[row] = digits.get_config()
        config.model = type(config.model)({**config.model.to_dict(), "width": (width, 2 * width),
            "mlp_dim": (2 * width, 4 * width), "depth": (1, 1), "num_heads": (1, 1)})
        config.epochs, config.log_every_steps, config.health = int(epochs), 11, False
        config.eval_every_epochs = 1
        config.checkpoint.every_steps = 10
    return Study("Widths", rows, seeds=(0, 1))
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "widths.py"
    path.write_text(STUDY)
    return path


def _results(**rows: tuple[float, ...]) -> list[Result]:
    return [
        Result(row, seed, top1, 1.0, 2.0, "1 × cpu")
        for row, values in rows.items()
        for seed, top1 in enumerate(values)
    ]


def test_an_interval_is_student_s_over_paired_seeds():
    found = statistics.difference([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])
    assert found.mean == pytest.approx(0.2)
    # 4.303 is the 97.5 % point for two degrees of freedom; the deviation of the differences is 0.1.
    assert found.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert not found.separated
    assert statistics.difference([0.5, 0.51, 0.52], [0.4, 0.41, 0.42]).separated
    assert not statistics.difference([0.9], [0.1]).separated


def test_the_table_says_which_rows_are_told_apart():
    study = Study("Title", dict.fromkeys(("a", "b", "c"), digits.get_config()))
    results = _results(a=(0.5, 0.51, 0.52), b=(0.6, 0.611, 0.62), c=(0.7, 0.4, 0.6))
    text = table.as_markdown(study, results)
    assert "| a | 51.00 ± 1.00 | 50.00, 51.00, 52.00 | 1.000 |  | 2.0 |" in text
    assert "- b is better than a: +10.03 ± 0.14 points." in text
    assert "- c and b are not told apart: -4.37 ± " in text
    assert text.endswith("3 seeds, trained on 1 × cpu.")
    only = table.findings(study.chosen(["a", "c"], []), results)
    assert only == [only[0]]
    assert only[0].startswith("- c and a are not")


def test_a_baseline_is_what_all_others_are_compared_with():
    rows = dict.fromkeys("abc", digits.get_config())
    assert Study("", rows).pairs() == [("b", "a"), ("c", "b")]
    assert Study("", rows, baseline="b").pairs() == [("a", "b"), ("c", "b")]
    assert Study("", rows, baseline="b").chosen(["a", "c"], [7]).pairs() == [("c", "a")]


def test_minutes_are_those_of_the_steps():
    lines = [
        {"step": 10, "images_per_second": 5.0},
        {"step": 10, "eval_top1": 0.5},
        {"step": 30, "images_per_second": 10.0},
    ]
    assert runs.training_minutes(lines, batch_size=60) == pytest.approx((120 + 120) / 60)


@pytest.mark.parametrize(
    ("row", "name"), [("+ LayerScale", "plus_layerscale"), ("both, weight 0.1", "both_weight_0.1")]
)
def test_workdirs_are_named_like_the_rows(row: str, name: str):
    assert runs.workdir_of(Path("d"), row, 2) == Path("d") / name / "seed2"


def test_a_study_that_is_stopped_continues_and_ends_with_the_same_table(
    study: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    def ablate(directory: str, *more: str) -> int:
        return cli.main(["ablate", str(study), "--dir", str(tmp_path / directory), *more])

    assert ablate("whole") == 0
    whole = capsys.readouterr().out
    assert whole.count("\n| ") == 4
    assert "2 seeds, trained on" in whole
    assert (tmp_path / "whole" / "figure.png").stat().st_size > 10_000
    assert whole == (tmp_path / "whole" / "table.md").read_text()

    train, calls = runs.train_and_evaluate, 0

    def dies(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise UserError("the power is gone")
        return train(*arguments, **options)

    monkeypatch.setattr(runs, "train_and_evaluate", dies)
    assert ablate("stopped") == 1
    assert len(runs.read_results(tmp_path / "stopped")) == 2
    (tmp_path / "stopped" / runs.RESULTS).write_text(  # as if killed before the second was written down
        json.dumps({"results": json.loads((tmp_path / "stopped" / runs.RESULTS).read_text())["results"][:1]})
    )
    capsys.readouterr()
    assert ablate("stopped") == 0
    assert _without_minutes(capsys.readouterr().out) == _without_minutes(whole)
    assert calls == 6  # the finished run is looked at again, not trained

    monkeypatch.setattr(runs, "train_and_evaluate", None)  # nothing is left to train
    assert ablate("stopped") == 0
    assert ablate("stopped", "--set", "optim.learning_rate=0.5") == 1
    assert "optim.learning_rate" in capsys.readouterr().err


def _without_minutes(text: str) -> list[str]:
    return [line.rpartition(" | ")[0] or line for line in text.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["icon"], "no study 'icon'; did you mean 'icons'?"),
        (["nowhere.py"], "no study 'nowhere.py'; there is no file nowhere.py"),
        (["icons", "--rows", "pyramid"], "--rows has 'pyramid'; did you mean"),
        (["icons", "--set", "optim.lr=1"], "--set optim.lr=1: "),
    ],
)
def test_says_what_is_wrong_in_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: Any):
    assert cli.main(["ablate", *arguments, "--dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_studies_of_the_package():
    for name in ("icons", "bivit_digits"):
        study = load_study(name)
        assert len(study.pairs()) == len(study.rows) - 1
