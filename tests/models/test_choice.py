"""How the model of a run executes: what is chosen by default, and that explicit settings are obeyed."""

from types import SimpleNamespace

import numpy as np
import pytest

from bvit_jax import models
from bvit_jax.config import default_config
from bvit_jax.errors import UserError
from bvit_jax.models import Execution, choose
from tests.tiny_models import tiny_config


def mesh_of(platform="cpu", devices=1):
    """Returns what `choose` reads of a mesh."""
    return SimpleNamespace(size=devices, devices=np.array([SimpleNamespace(platform=platform)] * devices))


def config_of(name="binaryvit", model=None, **settings):
    config = default_config()
    config.model = tiny_config(name, **(model or {}))
    config.update(settings)
    return config


ONE_CPU, CPUS, TPUS, GPU = mesh_of(), mesh_of(devices=4), mesh_of("tpu", 8), mesh_of("gpu")


@pytest.mark.parametrize(
    ("config", "mesh", "expected"),
    [
        (config_of(), ONE_CPU, Execution(scan_blocks=True, packed=True)),
        (config_of(model={"drop_path": 0.1}), ONE_CPU, Execution(packed=True)),  # whose masks a scan changes
        (config_of(packed="off"), ONE_CPU, Execution()),
        (config_of("bivit_release_deit"), ONE_CPU, Execution()),
        (config_of("deit"), ONE_CPU, Execution()),
        (config_of(), CPUS, Execution()),
        (config_of(), GPU, Execution()),
        (config_of(packed="on"), GPU, Execution(scan_blocks=True, packed=True)),
        (config_of(), TPUS, Execution("products")),
        (config_of("react_deit_ls"), TPUS, Execution("products")),
        (config_of(compute_dtype="bfloat16"), TPUS, Execution()),  # where products round more
        (config_of("binaryvit_w4"), TPUS, Execution()),  # not measured
        (config_of("binaryvit_w1a32"), TPUS, Execution()),
        (config_of("deit"), TPUS, Execution()),
    ],
)
def test_what_is_chosen_for_training(config, mesh, expected):
    assert choose(config, mesh, train=True) == expected


@pytest.mark.parametrize(
    ("settings", "mesh", "expected"),
    [
        ({}, ONE_CPU, Execution(packed=True, images_at_once=4)),
        ({"packed": "off"}, ONE_CPU, Execution(images_at_once=2)),
        ({}, CPUS, Execution()),
        ({}, TPUS, Execution()),
    ],
)
def test_what_is_chosen_for_evaluation(settings, mesh, expected):
    assert choose(config_of(**settings), mesh, train=False) == expected


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mesh", [ONE_CPU, CPUS, TPUS, GPU])
@pytest.mark.parametrize(
    "asked",
    [
        {"remat": "none", "scan_blocks": False, "one_pass_norms": False},
        {"remat": "dots", "scan_blocks": True, "one_pass_norms": True},
        {"remat": "products", "scan_blocks": False},
    ],
)
def test_what_is_asked_for_is_done(asked, mesh, train):
    execution = choose(config_of(**asked), mesh, train=train)
    assert {key: getattr(execution, key) for key in asked} == asked


def test_packing_is_for_one_device():
    with pytest.raises(UserError, match=r"config\.packed is on, which is for one device, and there are 4"):
        choose(config_of(packed="on"), CPUS, train=True)


def test_only_models_with_such_blocks_pack():
    assert models.packs_signs("binaryvit")
    assert not models.packs_signs("deit")
    models.create_model(tiny_config("deit"), execution=Execution(packed=True))  # to which it means nothing


def test_it_is_one_line():
    line = str(Execution("products", packed=True))
    assert line == (
        "remat=products, scan_blocks=False, one_pass_norms=False, packed=True, images_at_once=0,"
        " integer products on"
    )
