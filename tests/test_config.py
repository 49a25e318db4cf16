"""The table of settings: what is made from it, and the values it refuses."""

import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from bvit_jax import cli
from bvit_jax.config import SECTIONS, SETTINGS, check_section, default_config, eval_resize, validate
from bvit_jax.errors import UserError
from bvit_jax.models.factory import MODELS
from bvit_jax.report import settings as report

DOCS = Path(__file__).parents[1] / "docs" / "settings.md"


def test_every_setting_of_a_model_is_in_the_docs():
    rows = re.findall(r"^\| (`.*?`) \|", (DOCS.parent / "models.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert {key for family in MODELS.values() for key in family.settings()} <= named


def with_model() -> ConfigDict:
    config = default_config()
    config.model.name = "any"
    return config


def test_every_setting_has_its_default_and_nothing_else_is_there():
    config = default_config()
    assert {key for key in config if isinstance(config[key], ConfigDict)} == {*SECTIONS} - {""}
    found = {}
    for key, value in config.items():
        found |= (
            {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, ConfigDict) else {key: value}
        )
    assert found == {key: setting.default for key, setting in SETTINGS.items()}


def test_the_defaults_are_valid():
    validate(with_model())


def test_a_model_must_be_named():
    with pytest.raises(UserError, match=r"^config.model has no name; build it with"):
        validate(default_config())


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("seed", (-1, 2**32), "expected a whole number from 0 to 4294967295"),
        ("compute_dtype", ("float16",), "expected one of float32, bfloat16"),
        ("batch_size", (0, -1), "expected a whole number of at least 1"),
        ("profile_steps", ((5,), (0, 3), (3, 3), (4, 2), (1.0, 2)), "expected () or two ascending"),
        (
            "data.crop_scale",
            ((0.5, 0.1), (0.1, 1.5), (0.0, 1.0)),
            "expected two ascending numbers above 0, at",
        ),
        (
            "data.crop_ratio",
            ((0.0, 1.0), (1.0,), (float("nan"), 1.0)),
            "expected two ascending numbers above 0",
        ),
        ("data.color_jitter", ((-1.0, 0.0), (0.0,) * 5, (0.0, 0.0, 0.0, 0.6), ()), "expected brightness"),
        (
            "data.mean",
            ((0.5,), (0.5,) * 4, (float("nan"),) * 3, (123.7, 116.3, 103.5), (-0.1, 0.5, 0.5)),
            "expected three numbers from 0 to 1",
        ),
        ("data.std", ((0.5, 0.5, 0.0), (58.4, 57.1, 57.4), (float("inf"),) * 3), "expected three numbers"),
        ("data.eval_resize", (-1,), "expected a whole number of at least 0"),
        ("optim.learning_rate", (float("inf"), float("nan"), 0.0), "expected a number above 0"),
        ("optim.b2", (1.0, -0.1), "expected a number from 0 to below 1"),
        ("epochs", (2**31, True, 10**30), "expected a whole number of at least 1, below 2^31"),
        ("data.num_workers", (-2,), "expected a whole number of at least -1"),
        ("mix.prob", (-0.1, 1.1, float("nan")), "expected a number from 0 to 1"),
        ("mix.cutmix_minmax", ((0.8, 0.2), (0.2,), (0.2, 1.2)), "expected () or two ascending numbers"),
        ("optim.eps", (0.0, float("nan")), "expected a number above 0"),
        ("optim.weight_decay", (-1.0,), "expected a number of at least 0"),
        (
            "ema.decay",
            (1.0, -0.1),
            "expected a number from 0 to below 1, since 1 would keep the initial weights",
        ),
        ("loss.ranking_layers", ((0, 0), (-1,), (0.5,)), "expected () or different whole numbers from 0"),
    ],
)
def test_values_that_are_refused(key, values, message):
    for value in values:
        config = with_model()
        section, _, name = key.rpartition(".")
        node = config[section] if section else config
        node[name] = value
        for refuses in (lambda: validate(config), lambda: check_section(section, node)):  # noqa: B023
            with pytest.raises(UserError, match=rf"^config\.{re.escape(f'{key} is {value!r}; {message}')}"):
                refuses()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**32 - 1),
        ("profile_steps", (10, 15)),
        ("data.crop_scale", (1, 1)),
        ("data.color_jitter", (0.4, 0.4, 0.4)),
        ("data.color_jitter", (0.0, 0.0, 0.0, 0.5)),
        ("mix.cutmix_minmax", (0.2, 0.8)),
        ("loss.ranking_layers", (0, 5, 11)),
        ("loss.distillation_weight", 0),
    ],
)
def test_values_at_the_limits(key, value):
    config = with_model()
    config.update_from_flattened_dict({key: value})
    validate(config)


def test_settings_that_exclude_each_other():
    config = with_model()
    config.batch_size = 9
    validate(config)
    config.mix.mixup_alpha = 0.8
    with pytest.raises(UserError, match=r"^config.batch_size is 9; expected an even number, to mix pairs"):
        validate(config)
    config = with_model()
    config.update(batch_size=30, accumulate_steps=3)
    config.loss.ranking_every = 4
    validate(config)
    config.loss.ranking_weight = 1.0
    with pytest.raises(UserError, match=r"^config.loss.ranking_every is 4; .* the 10 images of a microbatch"):
        validate(config)


@pytest.mark.parametrize(
    ("size", "given", "used"), [(224, 0, 256), (384, 0, 438), (32, 0, 36), (224, 256, 256)]
)
def test_evaluation_resizes_in_proportion_to_the_image_size(size, given, used):
    config = with_model()
    config.model.image_size, config.data.eval_resize = size, given
    validate(config)
    assert eval_resize(config.data, size) == used


def test_evaluation_has_no_black_borders():
    config = with_model()
    config.model.image_size, config.data.eval_resize = 384, 256
    with pytest.raises(UserError, match=r"^config.data.eval_resize is 256; expected at least .*, 384, since"):
        validate(config)


def test_the_tables_in_the_docs(capsys):
    assert cli.main(["report", "settings"]) == 0
    printed = capsys.readouterr().out
    assert printed in DOCS.read_text()
    assert printed.count("\n| `") == len(SETTINGS)
    assert printed.startswith(report.BEGIN)
