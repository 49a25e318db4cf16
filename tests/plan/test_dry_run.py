import json
import logging
from pathlib import Path
from typing import Any

import pytest

from bvit_jax.errors import UserError
from bvit_jax.plan import dry_run as dry_run_lib
from bvit_jax.plan.dry_run import dry_run, table
from bvit_jax.plan.topology import DoesNotFit
from bvit_jax.runtime.chips import GIB
from bvit_jax.training.setup import build
from tests.configs import one_block
from tests.processes import ROOT, run


@pytest.fixture(scope="module")
def figures() -> dict:
    return dry_run(one_block.get_config())


@pytest.mark.slow
def test_what_it_tells_of_the_devices_that_are_here(figures: dict) -> None:
    assert figures["devices"] == 8
    assert figures["device_kind"] == "cpu"
    assert figures["images_per_device"] == 8
    assert figures["steps"] is None  # there is no data
    assert figures["parameters_bytes"] == 4 * figures["parameters"]
    assert figures["total_mb"] >= figures["temporaries_mb"] > 0
    assert figures["gflops_per_image"] > 0
    assert "bound_ms" not in figures  # nothing is published of a CPU
    json.dumps(figures)


def test_on_eight_devices_the_gradient_is_reduced_once(figures: dict) -> None:
    purposes = figures["collectives_for"]
    reduced = purposes["gradient"]["bytes"] + purposes["batch_norm_backward"]["bytes"]
    assert 0.9 * figures["parameters_bytes"] <= reduced <= 1.01 * figures["parameters_bytes"]
    assert purposes["batch_norm_forward"]["count"] > 0
    assert set(figures["collectives"]) == {"all-reduce"}


def test_every_program_of_the_run_is_compiled(figures: dict) -> None:
    names = ["keys", "create", "train", "health", "preview", "gather", "evaluate"]
    assert list(figures["programs"]) == names
    sizes = {name: program["total_mb"] for name, program in figures["programs"].items()}
    assert sizes["train"] == figures["total_mb"]
    assert figures["largest_mb"] == max(sizes.values()) == sizes[figures["largest_program"]]


@pytest.mark.slow
def test_another_program_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_step = dry_run_lib.compile_step

    def fails_for_health(lowered: Any) -> Any:
        if "jit_measure" in lowered.as_text()[:200]:
            raise DoesNotFit(3 * GIB, 2 * GIB)
        return compile_step(lowered)

    monkeypatch.setattr(dry_run_lib, "compile_step", fails_for_health)
    with pytest.raises(UserError, match=r"the health pass needs 3.00 GiB on each of 8 devices, of 2.00 GiB"):
        dry_run(one_block.get_config())


def test_the_table_has_every_figure(figures: dict) -> None:
    lines = table(figures).splitlines()
    assert any(line.startswith("programs evaluate ") and " MB, compiled in " in line for line in lines)
    assert any(line.startswith("total mb ") for line in lines)
    assert any(line.startswith("collectives for batch norm forward ") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "/nowhere/teacher"])
def test_a_teacher_that_is_not_there_is_replaced_by_shapes(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = one_block.get_config()
    config.model.image_size = config.data.eval_resize = 32
    config.loss.distillation_weight = 1.0
    config.teacher.path = path
    with caplog.at_level(logging.WARNING):
        teacher = dry_run_lib._teacher(config)
    assert "a DeiT-S in its place" in caplog.text
    run_ = build(config, 0, teacher=teacher)
    assert run_.teacher.model.image_size == 32
    assert run_.teacher.variables["params"]["head"]["kernel"].shape == (384, 10)
    dry_run_lib.lower(run_, config, config.batch_size)


def test_a_teacher_that_is_there_is_loaded_and_none_is_asked_for_without_distillation() -> None:
    config = one_block.get_config()
    assert dry_run_lib._teacher(config) is None
    config.teacher.path = str(ROOT / "bvit_jax" / "assets" / "deit_digits")
    config.loss.distillation_weight = 1.0
    assert dry_run_lib._teacher(config) is None  # build loads it


def test_settings_that_need_a_teacher_are_still_checked() -> None:
    config = one_block.get_config()
    config.loss.distillation_weight = 0.0
    config.teacher.path = "/nowhere"
    with pytest.raises(UserError, match=r"config.loss.distillation_weight is 0"):
        dry_run(config)


def test_a_batch_that_does_not_fit_on_unknown_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def does_not_fit(lowered: object) -> None:
        raise DoesNotFit(0, 0)

    monkeypatch.setattr(dry_run_lib, "compile_step", does_not_fit)
    with pytest.raises(UserError, match=r"config.batch_size is 64, 8 images on each of 8 devices"):
        dry_run(one_block.get_config())


@pytest.mark.slow
def test_the_command_without_a_topology(tmp_path: Path) -> None:
    flags = [f"--config={ROOT}/tests/configs/one_block.py:deit", f"--config.data.data_dir={tmp_path}"]
    result = run("train.py", "--dry_run", *flags, "--config.data.dataset=digits")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    printed = json.loads(line)
    assert printed["devices"] == 1
    assert printed["collectives"] == {}
    assert printed["steps"] == 44  # two epochs of the digits
    assert {"gflops_per_step", "gb_accessed_per_step", "temporaries_mb", "compile_seconds"} <= printed.keys()
