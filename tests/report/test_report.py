import json
from pathlib import Path

import pytest
from PIL import Image

from bvit_jax.report.__main__ import main


def test_curves_of_two_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        lines = [{"step": s, "loss": 1 / s, "learning_rate": 0.1} for s in (1, 2)]
        lines.append({"step": 2, "eval_top1": 0.5})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / run / "metrics.jsonl").write_text(text)
    output = tmp_path / "curves.png"
    assert main(["curves", str(tmp_path / "a"), str(tmp_path / "b"), f"--output={output}"]) == 0
    with Image.open(output) as image:
        assert image.width > 1000


def test_a_directory_without_metrics_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curves", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot read {tmp_path}")
