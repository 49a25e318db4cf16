import importlib.util
import json
import logging
import os
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from ml_collections import ConfigDict

from bvit_jax.errors import UserError
from bvit_jax.plan import dry_run as dry_run_lib
from bvit_jax.plan import gpus
from bvit_jax.plan.dry_run import dry_run
from bvit_jax.plan.topology import (
    DoesNotFit,
    compile_step,
    needed_and_available,
    open_topology,
    parse,
)
from bvit_jax.runtime.mesh import batch_sharded, make_mesh
from bvit_jax.training.setup import Run
from tests.configs import one_block
from tests.processes import ROOT, run

GIB = 2**30

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed: pip install "jax[tpu]"',
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:4x2", ("v5e", (4, 2))),
        ("v5e:16x16", ("v5e", (16, 16))),
        ("V4:2x2x1", ("v4", (2, 2, 1))),
        (" v5p:8x8x8", ("v5p", (8, 8, 8))),
        ("v6e:1x1", ("v6e", (1, 1))),
    ],
)
def test_names(name: str, expected: tuple) -> None:
    assert parse(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "--topology is 'v5e'; expected CHIP:SHAPE, such as v5e:4x4"),
        ("v5e:", "expected CHIP:SHAPE"),
        ("v5e:4*4", "expected CHIP:SHAPE"),
        ("v5f:4x4", "the chip 'v5f' is unknown; did you mean 'v5p'?"),
        ("gpu:4x4", "the chip 'gpu' is unknown; known: h100, h200, v4, v5e, v5p, v6e"),
        ("v5e:2x2x2", "v5e has 2 dimensions; try v5e:2x4"),
        ("v4:4x4", "v4 has 3 dimensions; try v4:2x2x4"),
        ("v5e:0x4", "v5e has 2 dimensions"),
        ("v5e:32x32", "1024 chips; a pod of v5e has 256; try v5e:16x16"),
    ],
)
def test_wrong_names_are_told_with_right_ones(name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("h100", ("H100", 1)), ("H200:8", ("H200", 8)), ("v5e:4x2", None), ("h100:2x2", None)],
)
def test_names_of_gpus(name: str, expected: tuple | None) -> None:
    found = gpus.parse(name)
    assert (found and (found[0].name, found[1])) == expected


def test_more_gpus_than_a_machine_has() -> None:
    with pytest.raises(UserError, match="--topology is 'h100:9'; expected 1 to 8 GPUs"):
        gpus.parse("h100:9")


def test_without_the_cuda_plugin_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "compiler_version", lambda: None)
    with pytest.raises(UserError, match=r'--topology=h100 needs the compiler.*pip install "jax\[cuda13\]"'):
        open_topology("h100")


@pytest.mark.slow
@pytest.mark.skipif(gpus.compiler_version() is None, reason='no CUDA plugin: pip install "jax[cuda13]"')
def test_compiles_for_gpus_without_one() -> None:
    topology = open_topology("h100:2")
    assert (topology.name, len(topology.devices)) == ("h100:2", 2)
    assert {device.device_kind for device in topology.devices} == set(topology.chip.device_kinds)
    mesh = make_mesh(topology.devices)
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=batch_sharded(mesh))
    compiled = jax.jit(lambda x: jnp.sum(x @ x.T)).lower(x).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 128 * 256 * 2
    assert "all-" in compiled.as_text()


def test_a_program_that_is_larger_than_a_gpu_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run_lib, "total_bytes", lambda compiled: 90 * 10**9)
    monkeypatch.setattr(dry_run_lib, "compile_step", lambda lowered: None)
    for kind, fits in (("NVIDIA H100 80GB HBM3", False), ("NVIDIA H200", True), ("cpu", True)):
        run: Any = SimpleNamespace(mesh=SimpleNamespace(devices=np.array(SimpleNamespace(device_kind=kind))))
        if fits:
            dry_run_lib._compiled(None, run)
        else:
            with pytest.raises(DoesNotFit, match=r"83\.82 GiB needed, 74\.51 GiB available"):
                dry_run_lib._compiled(None, run)


def test_without_libtpu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name, *rest)
    )
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r'needs the TPU compiler.*pip install "jax\[tpu\]"'):
        open_topology("v5e:2x2")


@pytest.mark.parametrize(
    ("libtpu", "message"),
    [
        (
            'ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm ..."',
            "libtpu is locked by another process; wait for it",
        ),
        ("INVALID_ARGUMENT: layout is not divisible by 2x2x1", "no such slice; try v5e:2x4 or v5e:2x2"),
        ("INTERNAL: Failed to open x.so\nmore", "cannot be loaded (INTERNAL: Failed to open x.so); install"),
    ],
)
def test_what_libtpu_says_becomes_one_line(
    libtpu: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**arguments: object) -> None:
        raise jax.errors.JaxRuntimeError(libtpu)

    monkeypatch.setattr(topologies, "get_topology_desc", fails)
    monkeypatch.setenv("TPU_LIBRARY_PATH", "libtpu.so")
    with pytest.raises(UserError) as error:
        open_topology("v5e:3x3")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries"
            " (320.00G) exceeds available HBM (15.75G).",
            (320 * GIB, 15.75 * GIB),
        ),
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", (20.5 * GIB, 15.75 * GIB)),
        ("RESOURCE_EXHAUSTED: something else", (0, 0)),
    ],
)
def test_what_the_compiler_says_of_memory(message: str, expected: tuple) -> None:
    assert needed_and_available(message) == expected


def test_only_a_lack_of_memory_is_one() -> None:
    def compile_fails(message: str) -> SimpleNamespace:
        def fails() -> None:
            raise jax.errors.JaxRuntimeError(message)

        return SimpleNamespace(compile=fails)

    with pytest.raises(DoesNotFit, match=r"20.50 GiB needed, 15.75 GiB available"):
        compile_step(compile_fails("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm."))
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_step(compile_fails("INTERNAL: bug"))


# --- with the TPU compiler ---------------------------------------------------------------------


def config_of(name: str, batch_size: int) -> ConfigDict:
    config = one_block.get_config(name)
    config.batch_size = config.eval_batch_size = batch_size
    return config


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "chips", "kind"),
    [("v5e:1x1", 1, "TPU v5 lite"), ("v4:2x2x2", 8, "TPU v4"), ("v5p:2x2x1", 4, "TPU v5")],
)
def test_a_chip_is_one_device(name: str, chips: int, kind: str) -> None:
    variables = dict(os.environ)
    topology = open_topology(name)
    assert dict(os.environ) == variables
    assert len(topology.devices) == chips
    assert kind in topology.chip.device_kinds
    assert {device.device_kind for device in topology.devices} == {kind}


@needs_libtpu
def test_a_shape_that_libtpu_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"'v5e:3x3', of which libtpu knows no such slice; try"):
        open_topology("v5e:3x3")


@needs_libtpu
@pytest.mark.slow
def test_cost_of_a_chip_does_not_grow_with_their_number() -> None:
    found = []
    for name, chips in (("v5e:2x2", 4), ("v5e:8x8", 64)):
        config = config_of("binaryvit", 8 * chips)
        found.append(dry_run(config, name))
    few, many = found
    assert (few["devices"], many["devices"]) == (4, 64)
    assert few["chip"] == "v5e"
    for key in ("total_mb", "bound_ms", "gflops_per_image"):
        assert many[key] == pytest.approx(few[key], rel=0.05)
    assert many["collectives"].keys() == few["collectives"].keys() == {"all-reduce"}
    for figures in found:
        purposes = figures["collectives_for"]
        reduced = purposes["gradient"]["bytes"] + purposes["batch_norm_backward"]["bytes"]
        # Not more than once; less, because parameters that add to the same sum have one gradient.
        assert 0.9 * figures["parameters_bytes"] <= reduced <= figures["parameters_bytes"]
        assert figures["temporaries_mb"] < figures["total_mb"] < figures["chip_mb"]
    for way in ("forward", "backward"):
        name = f"batch_norm_{way}"
        assert few["collectives_for"][name] == many["collectives_for"][name]
        assert few["collectives_for"][name]["count"] > 0


@pytest.mark.slow
@needs_libtpu
def test_a_batch_that_does_not_fit_names_one_that_does(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lower(run: Run, config: ConfigDict, images: int) -> Any:
        # A quarter of a GiB an image; the compiler takes minutes to find out that a model does not fit.
        x = jax.ShapeDtypeStruct((images, 2**26), jnp.float32, sharding=batch_sharded(run.mesh))
        return jax.jit(lambda x: x + 1).lower(x)

    monkeypatch.setattr(dry_run_lib, "lower", lower)
    with caplog.at_level(logging.INFO), pytest.raises(UserError) as error:
        dry_run(config_of("deit", 1024), "v5e:2x2")
    message = str(error.value)
    assert "config.batch_size is 1024, 256 images on each of 4 devices, which needs" in message
    assert "a v5e has 15.75 GiB" in message
    batch, images = 4 * int(message.partition("fits is ")[2].split()[0]), message.partition("batch_size=")[2]
    assert 0 < batch == int(images.split()[0])
    assert f"{batch // 4} images on a device need" in caplog.text


@needs_libtpu
@pytest.mark.slow
def test_the_command_prints_one_line_of_json() -> None:
    config = f"--config={ROOT}/tests/configs/one_block.py:deit"
    result = run("train.py", "--dry_run", config, "--topology=v6e:2x2")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    figures = json.loads(line)
    assert figures["device_kind"] == "TPU v6 lite"
    assert figures["images_per_device"] == 16
    assert "the data was not checked" in result.stderr
    assert "collectives for gradient" in result.stderr


@pytest.mark.slow
def test_a_topology_is_for_dry_runs() -> None:
    result = run("train.py", "--topology=v5e:2x2", "--workdir=/nowhere")
    assert result.returncode == 1
    assert result.stderr == "error: --topology=v5e:2x2 is for planning only; add --dry_run\n"
