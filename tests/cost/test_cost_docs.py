"""The figures of docs/cost.md are those that the command gives."""

import functools
import re

import pytest

from bvit_jax import models
from bvit_jax.cost import ModelCost
from bvit_jax.report.cost import Subject, as_text, figures, measure
from bvit_jax.runtime.arguments import parse_config
from tests.processes import ROOT

# ml_collections loads the file of a configuration in a way that importlib calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

TEXT = (ROOT / "docs" / "cost.md").read_text()
CONFIGS = {
    "ReActNet-DeiT-S": "react_deit_small:cls",
    "DeiT-S": "deit_small",
    "Bi-ViT DeiT-Ti": "bivit_deit",
    "Bi-ViT Swin-T": "bivit_swin",
}


@functools.cache
def cost(name: str, dtype: str, remat: str, training: bool) -> ModelCost:
    if name in CONFIGS:
        model = parse_config([f"--config={CONFIGS[name]}", "--config.model.drop_path=0.0"]).model
    else:
        model = models.model_config("bhvit" if name == "BHViT-S" else "swin", drop_path=0.0)
    return measure(Subject(model, dtype, remat), training=training)


def row(name: str) -> list[str]:
    (line,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", TEXT, re.MULTILINE)
    return line.split(" | ")


@pytest.mark.slow
def test_the_sums_of_binaryvit() -> None:
    report = figures(Subject(parse_config(["--config=binaryvit_small"]).model), depth=1)
    sums = as_text(report).split("\n\n", 1)[1].split("\n\nuncounted")[0]
    assert f"```\n{sums}\n```" in TEXT
    total = report["total"]
    assert f"there are {total['ops_with_elementwise'] / 1e9:.3f} G" in TEXT
    assert (
        f"{total['macs']['binary'] / 1e9:.3f} G binary and {total['macs']['real'] / 1e9:.4f} G real" in TEXT
    )
    assert row("BinaryViT")[0] == f"{report['training_bytes'] / 1e6:.1f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BHViT-S", *CONFIGS, "Swin-T"])
def test_intensity(name: str) -> None:
    total = cost(name, "float32", "none", training=False).total
    inference = cost(name, "float32", "none", training=False).inference_bytes
    assert row(name)[3:] == [
        f"{inference / 1e6:.1f}",
        f"{total.macs_per_byte:.1f}",
        f"{total.macs_per_packed_byte:.1f}",
        f"{total.ops_with_elementwise / 1e9:.3f} G",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DeiT-S", "Bi-ViT DeiT-Ti"])  # the others take minutes
def test_memory(name: str) -> None:
    ways = ("float32", "none"), ("bfloat16", "none"), ("bfloat16", "block")
    saved = [cost(name, *way, training=True).total.saved_bytes for way in ways]
    assert row(name)[:3] == [f"{size / 1e6:.1f}" for size in saved]
