"""Runs that start from given weights: what is taken of a file, what is refused, what a run does with it."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax import models, weights
from bvit_jax.errors import UserError
from bvit_jax.plan import dry_run as dry_run_lib
from bvit_jax.plan.dry_run import dry_run
from bvit_jax.plan.topology import DoesNotFit
from bvit_jax.runtime.interruption import Interrupted
from bvit_jax.runtime.mesh import replicate
from bvit_jax.training import initial
from bvit_jax.training.loop import train_and_evaluate
from bvit_jax.training.setup import build
from bvit_jax.training.steps.state import create_state
from bvit_jax.weights.preprocessing import Preprocessing
from bvit_jax.weights.pretrained import Pretrained
from bvit_jax.weights.state_dicts import StateDictError
from bvit_jax.workdir import runs
from bvit_jax.workdir.checkpoint import Checkpoints, is_saved
from tests.configs import from_teacher, tiny
from tests.inprocess import Notice
from tests.processes import ROOT, finish, metrics_of, start_many
from tests.processes import run as run_script
from tests.small import SIZE, Small, optimizer
from tests.tiny_models import abstract_of, assert_same_trees, random_variables, tiny_config, tiny_pretrained

KEY = jax.random.key(0)


def flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def teacher_of(**settings: Any) -> Pretrained:
    """Returns a real DeiT with random weights for the students of `from_teacher`."""
    heads = {"distillation_token": True, "distillation_head": True}
    shape = {**from_teacher.SHAPE, "num_classes": 10, **heads, **settings}
    config = models.model_config("deit", **shape)
    return Pretrained(
        config=config,
        variables=random_variables(abstract_of(config)),
        preprocessing=Preprocessing(18, config.image_size, mean=(0.5,) * 3, std=(0.5,) * 3),
        class_names=tuple(map(str, range(config.num_classes))),
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("models") / "teacher"
    weights.save(teacher_of(), target)
    return target


def config_of(data_dir: Path, teacher: Path) -> ConfigDict:
    config = from_teacher.get_config()
    config.data.data_dir, config.teacher.path = str(data_dir), str(teacher)
    return config


# --- what is taken ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("deit_heads", "bivit_release_deit"),
        ("deit", "bivit_release_deit_plain"),
        ("swin", "bivit_release_swin"),
    ],
)
def test_a_binary_model_takes_the_kernels_of_its_real_one(source: str, target: str) -> None:
    arrays = flat(tiny_pretrained(source).variables)
    shapes = {name: leaf.shape for name, leaf in flat(abstract_of(tiny_config(target))).items()}
    selection = initial.select(arrays, shapes)
    assert set(selection.taken) == arrays.keys() & shapes.keys()
    assert {name for name in arrays if arrays[name].ndim > 1} <= set(selection.taken)
    assert set(selection.kept) == shapes.keys() - arrays.keys()
    assert {name.rpartition("/")[2] for name in selection.kept} <= {
        *("alpha", "zero_point", "init_state", "signed", "scale", "bias")
    }
    assert set(selection.left_out) == arrays.keys() - shapes.keys()
    assert all(name.endswith("/bias") for name in selection.left_out)


@pytest.mark.parametrize(
    ("array", "shape", "message"),
    [
        (None, (2, 3), "1 missing (params/x)"),
        (np.zeros((2, 3)), None, "1 unexpected (params/x)"),
        (np.zeros((1, 1, 4)), None, "1 unexpected (params/x)"),  # a token
        (np.zeros(2), (3,), "params/x is (2,), expected (3,)"),
        (np.zeros((2, 3)), (3, 2), "params/x is (2, 3), expected (3, 2)"),
        (np.zeros(3, np.int64), (3,), "params/x holds int64"),
    ],
)
def test_arrays_that_do_not_fit(array: Any, shape: Any, message: str) -> None:
    arrays = {} if array is None else {"params/x": array}
    with pytest.raises(StateDictError, match=re.escape(message)):
        initial.select(arrays, {} if shape is None else {"params/x": shape})


@pytest.mark.parametrize("array", [None, np.zeros(()), np.zeros(3)])
@pytest.mark.parametrize("shape", [None, (), (3,)])
def test_small_arrays_may_be_missing(array: Any, shape: Any) -> None:
    arrays = {} if array is None else {"params/x": array}
    shapes = {} if shape is None else {"params/x": shape}
    if arrays and shapes:
        return
    assert len(initial.select(arrays, shapes).taken) == 0


@pytest.mark.parametrize(
    ("source", "student", "advice"),
    [
        (
            {"distillation_token": False, "distillation_head": False},
            {},
            "2 missing (params/distillation_head/kernel, params/embedding/distillation_token); 1 of another"
            " shape (params/embedding/positions is (1, 17, 16), expected (1, 18, 16)); they are of a model"
            " with config.model.distillation_head=False, config.model.distillation_token=False, where this"
            " run has True, True: change that or name others",
        ),
        (
            {},
            {"distillation_head": False},
            "1 unexpected (params/distillation_head/kernel); they are of a model with"
            " config.model.distillation_head=True, where this run has False",
        ),
        ({"depth": 2}, {}, "they are of a model with config.model.depth=2, where this run has 1"),
        (
            {"num_classes": 4},
            {},
            "params/head/bias is (4,), expected (10,), params/head/kernel is (16, 4), expected (16, 10));"
            " they are of a model with config.model.num_classes=4, where this run has 10: change that or name"
            " others; or adapt them: config.init.adapt=True",
        ),
        (
            {"image_size": 32},
            {},
            "params/embedding/positions is (1, 66, 16), expected (1, 18, 16)); they are of a model with"
            " config.model.image_size=32, where this run has 16",
        ),
        (
            {},
            {"name": "react_deit"},
            "they are of the model deit and config.model.name is react_deit; name weights of a model with"
            " the same layers",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_settings(
    source: dict, student: dict, advice: str, tmp_path: Path
) -> None:
    weights.save(teacher_of(**source), tmp_path / "source.safetensors")
    config = from_teacher.get_config()
    if "name" in student:
        config.model = models.model_config(student["name"], num_classes=10, **from_teacher.SHAPE)
    else:
        config.model.update(student)
    config.init.path = str(tmp_path / "source.safetensors")
    with pytest.raises(UserError) as error:
        initial.load(config, abstract_of(config.model))
    message = str(error.value)
    assert message.startswith(
        f"config.init.path: the weights in {config.init.path} have arrays that do not fit"
    )
    assert advice in message


def test_it_tells_what_becomes_of_the_arrays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = teacher_of()
    weights.save(source, tmp_path / "a.safetensors")
    config = from_teacher.get_config()
    config.init.path = str(tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO, "bvit_jax"):
        loaded = initial.load(config, abstract_of(config.model))
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.search(
        r"from .*a.safetensors: 21 arrays with [34],\d{3} values are taken, such as params/norm/scale;"
        r" \d+ keep their own start, such as params/block0/value_act/zero_point;"
        r" 6 of the file are left out, such as params/block0/value/bias$",
        line,
    )
    assert loaded.digest == source.digest()
    there = flat(source.variables)
    for name, array in flat(loaded.variables).items():
        np.testing.assert_array_equal(array, there[name])

    caplog.clear()
    config.data.mean = (0.4, 0.5, 0.6)
    with caplog.at_level(logging.INFO, "bvit_jax"):
        initial.load(config, abstract_of(config.model))
    _, record = caplog.records
    assert "config.data.mean=(0.5, 0.5, 0.5)" in record.getMessage()
    assert "this run normalises with (0.4, 0.5, 0.6)" in record.getMessage()


# --- the state ----------------------------------------------------------------------------------


def test_given_arrays_take_the_place_of_random_ones() -> None:
    plain = create_state(KEY, Small(dtype=jnp.float32), optimizer(), SIZE, ema=True)
    given = {"params": {"norm": {"scale": np.full(plain.params["norm"]["scale"].shape, 3, np.float32)}}}
    state = create_state(KEY, Small(dtype=jnp.float32), optimizer(), SIZE, given, ema=True)
    assert (state.params["norm"]["scale"] == 3).all()
    assert_same_trees(state.ema, state.variables)
    rest = state.params | {"norm": state.params["norm"] | {"scale": plain.params["norm"]["scale"]}}
    assert_same_trees(rest, plain.params)
    assert_same_trees(state.opt_state, plain.opt_state)
    assert_same_trees(state.batch_stats, plain.batch_stats)


@pytest.mark.slow
def test_a_sharded_state_starts_from_them(data_dir: Path, teacher: Path) -> None:
    config = config_of(data_dir, teacher)
    config.mesh.fsdp = 2
    built = build(config, 1437)
    given = initial.load(config, built.state.variables)
    state = built.programs.create.run(KEY, replicate(given.variables, built.mesh))
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(built.state), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
    kernel = state.params["block0"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    theirs, ours = flat(weights.load(teacher).variables), flat(state.variables)
    assert len(theirs.keys() & ours.keys()) == 21
    for name in theirs.keys() & ours.keys():
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert_same_trees(jax.device_get(state.ema), jax.device_get(state.variables))
    packed = np.packbits(theirs["params/block0/query/kernel"] > 0)
    np.testing.assert_array_equal(state.signs["block0"]["query"], packed)


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_starts_from_its_teacher_and_continues_without_the_file(
    data_dir: Path, teacher: Path, tmp_path: Path
) -> None:
    config = config_of(data_dir, teacher)
    config.init.path = str(tmp_path / "copy")
    shutil.copytree(teacher, tmp_path / "copy")
    created: list[Any] = []
    run = build(config, 1437)
    create = run.programs.create.function

    def noted(*arguments: Any) -> Any:
        created.append(jax.device_get(create(*arguments)))
        return create(*arguments)

    run.programs.create.run = noted  # which is not compiled again
    assert not is_saved(tmp_path / "whole")
    printed = train_and_evaluate(config, tmp_path / "whole", run=run)
    assert is_saved(tmp_path / "whole")
    (first,) = created
    theirs, ours = flat(weights.load(teacher).variables), flat(first.params)
    for name in (name for name, array in theirs.items() if array.ndim > 1):
        np.testing.assert_array_equal(ours[name.removeprefix("params/")], theirs[name])
    assert_same_trees(first.ema, first.variables)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["init"]["path"] == config.init.path

    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "whole", broken)
    shutil.rmtree(broken / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "copy")
    assert train_and_evaluate(config, broken, run=run) == printed
    assert metrics_of(broken) == metrics_of(tmp_path / "whole")
    for ema in (True, False):
        ends = [runs.load_run(path, "latest", ema).variables for path in (tmp_path / "whole", broken)]
        assert_same_trees(*ends)
    assert len(created) == 1

    # Its workdir is a source in turn: its average, the flags of its quantisers among it.
    config.init.path = str(broken)
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path / "second", run=run, interruption=Notice(1))
    assert_same_trees(created[1].variables, runs.load_model(broken).variables)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere", "config.init.path: no file or directory /nowhere"),
        ("", "config.init.path: no config.json"),
    ],
)
def test_a_path_that_cannot_be_read_stops_the_run_before_anything_is_made(
    path: str, message: str, data_dir: Path, tmp_path: Path
) -> None:
    config = tiny.get_config()
    config.data.data_dir = str(data_dir)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    config.init.path = path or str(tmp_path / "empty")
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- the configuration --------------------------------------------------------------------------


def test_a_reference_to_the_teacher_follows_it_until_it_is_set(tmp_path: Path) -> None:
    config = from_teacher.get_config()
    config.lock()
    config.teacher.path = "a"
    assert config.init.path == "a"
    assert json.loads(config.to_json())["init"]["path"] == "a"
    config_lib.save(config, tmp_path / "config.json")
    assert config_lib.load(tmp_path / "config.json").init.path == "a"
    config.init.path = "b"
    config.teacher.path = "c"
    assert (config.teacher.path, config.init.path) == ("c", "b")
    assert config_lib.default_config().init.path == ""


@pytest.mark.slow
def test_a_dry_run_needs_no_teacher_but_other_weights(
    teacher: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_teacher.get_config()
    config.data.dataset, config.data.data_dir = "imagenet2012", "/nowhere"
    config.teacher.path = "/nowhere"

    def far_enough(lowered: object) -> None:
        raise DoesNotFit(0, 0)

    monkeypatch.setattr(dry_run_lib, "compile_step", far_enough)
    with pytest.raises(UserError, match=r"config.batch_size is 480"):
        dry_run(config)
    assert "the weights to start from were not checked: there is no /nowhere" in caplog.text
    config.init.path = str(teacher)
    config.model.depth = 2
    with pytest.raises(UserError, match=r"config.model.depth=1, where this run has 2"):
        dry_run(config)
    config.init.path = "/nowhere/else"
    with pytest.raises(UserError, match=r"config.init.path: no file or directory /nowhere/else"):
        dry_run(config)


# --- real processes -----------------------------------------------------------------------------


def flags_of(workdir: Path, data_dir: Path, *more: str) -> list[str]:
    config = f"--config={ROOT}/tests/configs/from_teacher.py"
    return [config, f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", *more]


@pytest.mark.slow
def test_the_commands_train_a_binary_student_from_hugging_face_s_deit(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = from_teacher.SHAPE
    settings = transformers.DeiTConfig(
        image_size=shape["image_size"],
        patch_size=shape["patch_size"],
        hidden_size=shape["width"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["num_heads"],
        intermediate_size=shape["mlp_dim"],
        num_labels=10,
    )
    transformers.DeiTForImageClassificationWithTeacher(settings).save_pretrained(tmp_path / "teacher")
    workdir = tmp_path / "run"
    result = run_script(
        "train.py", *flags_of(workdir, data_dir, f"--config.teacher.path={tmp_path / 'teacher'}")
    )
    assert result.returncode == 0, result.stderr
    assert f"starting from {tmp_path / 'teacher'}: 21 arrays" in result.stderr
    assert "these weights were trained on images with config.data.mean=(0.485" in result.stderr
    printed = json.loads(result.stdout)
    assert printed["step"] == 4
    assert json.loads((workdir / "config.json").read_text())["init"]["path"] == str(tmp_path / "teacher")
    evaluated = run_script("eval.py", f"--workdir={workdir}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["top1"] == printed["ema_top1"]

    # One flag alone: the teacher is still the one that was named before.
    flags = [f"--config.teacher.path={tmp_path / 'teacher'}", "--config.init.path=/nowhere"]
    wrong = run_script("train.py", *flags_of(tmp_path / "other", data_dir, *flags))
    assert wrong.returncode == 1
    assert wrong.stderr == "error: config.init.path: no file or directory /nowhere; expected a checkpoint\n"


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_two_processes_start_from_the_workdir_of_a_run(data_dir: Path, teacher: Path, tmp_path: Path) -> None:
    first, config = tmp_path / "first", config_of(data_dir, teacher)
    built = build(config, 1437)
    first.mkdir()
    config_lib.save(config, first / "config.json")
    checkpoints = Checkpoints(first, keep=1)
    checkpoints.save(3, built.programs.create.run(KEY, {}), {})
    checkpoints.close()

    flags = [f"--config.teacher.path={teacher}", f"--config.init.path={first}", "--config.epochs=1"]
    results = [finish(process) for process in start_many(2, *flags_of(tmp_path / "second", data_dir, *flags))]
    for index, result in enumerate(results):
        assert result.returncode == 0, result.stderr
        assert (f"starting from {first}: " in result.stderr) == (index == 0)
    assert json.loads(results[0].stdout.splitlines()[-1])["step"] == 2
