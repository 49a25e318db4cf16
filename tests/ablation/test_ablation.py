import json
import math
from pathlib import Path
from typing import Any

import pytest

from bvit_jax import cli
from bvit_jax import config as config_lib
from bvit_jax.ablation import comparison, runs, table
from bvit_jax.ablation.runs import Result
from bvit_jax.ablation.study import STUDIES, Study, load_study
from bvit_jax.configs import digits
from bvit_jax.errors import UserError

STUDY = """
from bvit_jax.ablation import Study
from bvit_jax.configs import deit_digits
from bvit_jax.models import model_config

def get_study(epochs="1"):
    rows = {}
    for row, rate in (("slow", 1e-4), ("+ rate", 2e-3)):
        config = rows[row] = deit_digits.get_config()
        sizes = {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 1, "mlp_dim": 16}
        config.model = model_config("deit", image_size=32, num_classes=10, **sizes)
        config.epochs, config.log_every_steps, config.health = int(epochs), 11, False
        config.optim.learning_rate, config.optim.warmup_epochs = rate, 0
    return Study("Rates", rows, seeds=(0, 1))
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "rates.py"
    path.write_text(STUDY)
    return path


def _results(**rows: tuple[float, ...]) -> list[Result]:
    return [
        Result(row, seed, top1, 1.0, 2.0, "1 × cpu")
        for row, values in rows.items()
        for seed, top1 in enumerate(values)
    ]


def test_an_interval_is_student_s_over_paired_seeds():
    found = comparison.difference([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])
    assert found.mean == pytest.approx(0.2)
    # 4.303 is the 97.5 % point for two degrees of freedom; the deviation of the differences is 0.1.
    assert found.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert not found.clear
    assert comparison.difference([0.5, 0.51, 0.52], [0.4, 0.41, 0.42]).clear
    assert not comparison.difference([0.9], [0.1]).clear


def test_the_table_says_which_rows_differ_clearly():
    study = Study("Title", dict.fromkeys(("a", "b", "c"), digits.get_config()))
    results = _results(a=(0.5, 0.51, 0.52), b=(0.6, 0.611, 0.62), c=(0.7, 0.4, 0.6))
    text = table.as_markdown(study, results)
    assert "| a | 51.00 ± 1.00 | 50.00, 51.00, 52.00 | 1.000 |  | 2.0 |" in text
    assert "- b is better than a: +10.03 ± 0.14 points." in text
    assert "- no clear difference between c and b: -4.37 ± " in text
    assert text.endswith("3 seeds, trained on 1 × cpu.")
    only = table.findings(study.chosen(["a", "c"], []), results)
    assert only == [only[0]]
    assert only[0].startswith("- no clear difference between c and a")


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


@pytest.mark.slow
def test_trains_compares_and_draws(study: Path, tmp_path: Path, capsys: Any):
    arguments = ["ablate", str(study), "--dir", str(tmp_path / "runs"), "--rows", "+ rate"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 3
    assert "2 seeds, trained on" in printed
    assert printed == (tmp_path / "runs" / "table.md").read_text()
    assert (tmp_path / "runs" / "figure.png").stat().st_size > 10_000
    first, second = runs.read_results(tmp_path / "runs")
    assert (first.row, first.seed, second.seed) == ("+ rate", 0, 1)
    assert first.loss != second.loss  # the seeds' own
    assert first.minutes > 0
    (tmp_path / "runs" / runs.RESULTS).unlink()
    assert cli.main(arguments) == 0  # the finished runs tell again what they found
    assert capsys.readouterr().out == printed


def test_a_study_that_is_stopped_continues_and_ends_with_the_same_table(
    study: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    trained: list[tuple[str, int]] = []
    until = 4

    def train(config: Any, workdir: Path, **options: Any) -> dict[str, float]:
        """Stands for the loop, which is tested where it is."""
        if len(trained) == until:
            raise UserError("the power is gone")
        trained.append((workdir.parent.name, config.seed))
        workdir.mkdir(parents=True)
        config_lib.save(config, workdir / "config.json")
        line = {"step": 22, "images_per_second": 100.0, "eval_top1": 0.1}
        (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return {"top1": config.optim.learning_rate * 100 + config.seed / 10, "loss": 2.0}

    monkeypatch.setattr(runs, "train_and_evaluate", train)
    monkeypatch.setattr(runs, "build", lambda config, images: None)

    def ablate(directory: str, *more: str) -> int:
        return cli.main(["ablate", str(study), "--dir", str(tmp_path / directory), *more])

    assert ablate("whole") == 0
    whole = capsys.readouterr().out
    assert trained == [("slow", 0), ("plus_rate", 0), ("slow", 1), ("plus_rate", 1)]
    assert "- + rate is better than slow: +19.00 ± 0.00 points." in whole

    trained.clear()
    until = 3
    assert ablate("stopped") == 1
    assert capsys.readouterr().err == "error: the power is gone\n"
    until = 4
    assert ablate("stopped") == 0
    assert capsys.readouterr().out == whole
    assert ablate("stopped") == 0
    assert len(trained) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["icon"], "no study 'icon'; did you mean 'icons'?"),
        (["nowhere.py"], "no study 'nowhere.py'; there is no file nowhere.py"),
        (["icons", "--rows", "pyramid"], "--rows has 'pyramid'; known: "),
        (["icons", "--set", "optim.lr=1"], "--set optim.lr=1: "),
    ],
)
def test_says_what_is_wrong_in_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: Any):
    assert cli.main(["ablate", *arguments, "--dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_studies_of_the_package():
    names = [path.stem for path in STUDIES.glob("[!_]*.py")]
    assert len(names) >= 7
    for name in names:
        study = load_study(name)
        assert len(study.pairs()) == len(study.rows) - 1
        for config in study.rows.values():
            config_lib.validate(config)
