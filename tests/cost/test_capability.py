"""Representational capability: the three published numbers, and what follows for the models here."""

import json
from pathlib import Path

import pytest

from bvit_jax import models
from bvit_jax.cost import capability
from bvit_jax.errors import UserError
from bvit_jax.report.__main__ import main
from bvit_jax.report.capability import ABLATION, all_derivations, one_as_text, summary

# ml_collections loads the file of a configuration in a way that importlib calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIGS = Path(__file__).parents[2] / "configs"


def of(name, **settings):
    return capability.capability_of(models.model_config(name, **settings)).capability


def test_the_published_resnet34():
    value = 7 * 7 * 3 * 255 // 2
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        value = value * (4 if stage else 1) + blocks * 9 * width
    assert capability.resnet34().capability == 49 * value == 71_193_472


def test_the_published_deit_small_as_the_formula_and_as_printed():
    value = capability.deit_small().capability
    assert value == 16 * 16 * 3 * 255 // 2 + 12 * (4 * 384 + 196 + 2 * 1536) == 155_568
    assert value - 12 * 196 == 153_216
    assert "153,216" in " ".join(capability.deit_small().notes)


def test_every_line_follows_from_the_one_before():
    derivations = all_derivations()
    for item in (derivations[0], *derivations[-2:]):
        value = 0
        for line in item.lines:
            value = line.factor * value + line.added
            assert line.capability == value
        assert item.capability == value


def test_binaryvit_by_the_same_rules():
    value, side = 4 * 4 * 3 * 255 // 2, 56
    stages = zip((64, 128, 256, 512), (3, 4, 8, 4), (512, 1024, 1024, 2048), (8, 4, 1, 1))
    for stage, (c, depth, m, r) in enumerate(stages):
        if stage:
            side //= 2
            value = 4 * value + 4 * (c // 2)
        value += depth * (4 * c + (side // r) ** 2 + 2 * m)
    assert of("binaryvit") == 49 * value == 46_566_660


def test_bhvit_by_the_same_rules():
    value, side, c = 4 * 4 * 3 * 255 // 2, 56, 64
    for stage, (depth, m) in enumerate(zip((3, 4, 8, 4), (512, 1024, 1024, 2048))):
        if stage:
            value = 4 * (value + c)
            side, c = side // 2, 2 * c
        keys = 7 * 7 + (side // 7) ** 2
        value += depth * (2 * m + (27 * c // 4 if stage < 2 else 4 * c + 3 * keys))
    assert of("bhvit") == 49 * value


def test_the_ablation_by_the_same_rules():
    values = [of("react_deit", **settings) for settings in ABLATION.values()]
    assert values == [155_568, 196 * 155_568, 196 * 155_568, 196 * 155_568]


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("deit", {}, "config.model.name"),
        ("bivit_swin", {}, "config.model.name"),
        ("binaryvit", {"weight_bits": 2}, "config.model.weight_bits is 2"),
        ("react_deit", {"act_bits": 32}, "config.model.act_bits is 32"),
        ("binaryvit", {"some_fp": True}, "config.model.some_fp"),
        ("bhvit", {"some_fp": True}, "config.model.some_fp"),
    ],
)
def test_models_that_the_rules_say_nothing_of(name, settings, key):
    with pytest.raises(UserError, match=key):
        of(name, **settings)


def test_the_command_of_all(capsys):
    assert main(["capability", "--all", "--json"]) == 0
    values = {item["network"]: item["capability"] for item in json.loads(capsys.readouterr().out)}
    assert values["ResNet-34"] == 71_193_472
    assert values["DeiT-S"] == values["ReActNet-DeiT-S"] == 155_568
    assert values["BinaryViT"] == 46_566_660


def test_the_command_of_a_configuration(capsys):
    flags = [f"--config={CONFIGS / 'react_deit_small.py'}:cls", "--config.model.depth=2"]
    assert main(["capability", *flags]) == 0
    text = capsys.readouterr().out
    assert f"{97_920 + 2 * 4_804:,}" in text
    assert "reconstructed" in text


def test_all_and_a_configuration_exclude_each_other(capsys):
    assert main(["capability", "--all", "--config=x.py"]) == 1
    assert "leave out --config=x.py" in capsys.readouterr().err


def test_the_documentation_has_what_the_command_prints():
    text = (CONFIGS.parent / "docs" / "cost.md").read_text()
    derivations = all_derivations()
    assert summary(derivations) in text
    assert one_as_text(derivations[0]) in text
    assert one_as_text(derivations[-1]) in text
