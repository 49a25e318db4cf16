import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bvit_jax import config as config_lib
from bvit_jax import models, optim, weights
from bvit_jax.augment.normalization import Normalization
from bvit_jax.errors import UserError
from bvit_jax.runtime.mesh import make_mesh, replicated, shard_batch
from bvit_jax.training.evaluation import eval_batches, eval_settings, evaluate
from bvit_jax.training.loop import train_and_evaluate
from bvit_jax.training.setup import Run, build, open_splits
from bvit_jax.training.steps.evaluate import EvalSettings, eval_step
from bvit_jax.training.steps.programs import jit_eval_step
from bvit_jax.training.steps.state import create_state
from bvit_jax.training.teacher import load_teacher
from bvit_jax.workdir.checkpoint import Checkpoints
from configs import digits
from tests.configs import tiny
from tests.processes import ROOT, environment, metrics_of
from tests.small import jit_train_step, make_train_step
from tests.tiny_models import tiny_pretrained


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def tiny_config(data_dir: Path, **settings: object) -> ConfigDict:
    config = tiny.get_config()
    config.data.data_dir = str(data_dir)
    for key, value in settings.items():
        node, _, name = key.replace("__", ".").rpartition(".")
        (config[node] if node else config)[name] = value
    return config


def on_one_device(config: ConfigDict) -> Run:
    """Returns what a run compiles; for eight devices that takes longer."""
    return build(config, open_splits(config).num_examples, jax.devices()[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__dataset": "imagenet2012"}, "config.data.dataset 'imagenet2012' is not prepared"),
        ({"data__train_split": "trian"}, "trian"),
        (
            {"teacher__path": "/nowhere", "loss__distillation_weight": 0.9},
            "config.teacher.path: no file or directory /nowhere",
        ),
        ({"teacher__path": "/nowhere"}, "config.loss.distillation_weight is 0"),
        ({"loss__distillation_weight": 1.0}, "config.teacher.path is empty"),
        ({"model__num_classes": 11}, "config.model.num_classes is 11"),
        ({"batch_size": 12}, "config.batch_size is 12; expected a multiple of the 8 devices"),
        ({"optim__schedule": "linear"}, "config.optim.schedule is 'linear'"),
        ({"loss__label_smoothing": 2.0}, "config.loss.label_smoothing is 2.0"),
        ({"epochs": 0}, "config.epochs is 0"),
        ({"mix__mode": "pairs"}, "config.mix.mode is 'pairs'; expected one of batch, pair, elem"),
        ({"mix__mixup_alpha": -0.8}, "config.mix.mixup_alpha is -0.8"),
        ({"mix__switch_prob": 1.5}, "config.mix.switch_prob is 1.5"),
        ({"mix__cutmix_minmax": (0.8, 0.2)}, "config.mix.cutmix_minmax is (0.8, 0.2)"),
        ({"mix__mixup_alpha": 0.8, "batch_size": 9}, "config.batch_size is 9; expected an even number"),
        ({"erase__prob": 2.0}, "config.erase.prob is 2.0"),
        ({"erase__mode": "noise"}, "config.erase.mode is 'noise'"),
        ({"data__auto_augment": "rand-x1"}, "in which 'x1' is unknown"),
        ({"data__color_jitter": (-1.0, 0.4, 0.4)}, "config.data.color_jitter is (-1.0, 0.4, 0.4); expected"),
        ({"data__repeats": 0}, "config.data.repeats is 0"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str, data_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(data_dir, **settings)
    with pytest.raises(UserError) as error:
        train_and_evaluate(config, tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_configuration_of_an_older_version_gets_the_settings_that_came_later(tmp_path: Path) -> None:
    config = tiny.get_config()
    config_lib.save(config, tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    del values["mix"], values["init"], values["data"]["repeats"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config_lib.load(tmp_path / "config.json").to_dict() == config.to_dict()


def test_a_teacher_with_other_classes_is_refused() -> None:
    config = digits.get_config()
    config.model.num_classes = 11
    with pytest.raises(UserError, match=r"the teacher in .* has num_classes 10 and the student 11"):
        load_teacher(config)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_teacher_with_nan_is_named_before_the_first_step(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = digits.get_config()
    source = weights.load(Path(config.teacher.path))
    variables = jax.tree.map(np.array, source.variables)
    variables["params"]["head"]["bias"][3] = value
    damaged = dataclasses.replace(source, variables=variables)
    monkeypatch.setattr(weights, "load", lambda path: damaged)
    with pytest.raises(
        UserError, match=r"^config.teacher.path: .*deit_digits holds NaN or .* in 1 arrays, such as"
    ):
        load_teacher(config)


def test_a_teacher_with_another_image_size_is_refused(data_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(data_dir)
    config.loss.distillation_weight = 1.0
    config.teacher.path = str(ROOT / "bvit_jax" / "assets" / "deit_digits")
    with pytest.raises(UserError, match=r"the teacher in .* has image_size 32 and the student 16"):
        train_and_evaluate(config, tmp_path / "run")


def test_a_workdir_that_cannot_be_made_is_named(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the workdir"):
        train_and_evaluate(tiny_config(data_dir), tmp_path / "file" / "run")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(data_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(data_dir, optim__learning_rate=1e30)
    with pytest.raises(UserError, match=r"(loss|gradient_norm) is not finite at step 2;"):
        train_and_evaluate(config, tmp_path, run=on_one_device(config))
    assert Checkpoints(tmp_path, keep=1).latest_step() is None


# --- teachers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_teacher_that_ships_knows_its_digits(data_dir: Path) -> None:
    config = digits.get_config()
    config.data.data_dir = str(data_dir)
    teacher = load_teacher(config)
    mesh = make_mesh()
    step = jit_eval_step(eval_settings(config, mesh, teacher.model), mesh)
    figures = evaluate(step, teacher.variables, eval_batches(config, mesh), mesh)
    assert figures["images"] == 360
    assert figures["top1"] >= 0.97


@pytest.mark.slow
def test_distillation_mixed_with_labels_in_bfloat16(data_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(data_dir, epochs=1, batch_size=480, compute_dtype="bfloat16")
    teacher = tiny_pretrained("deit", num_classes=10, image_size=16, patch_size=8)
    weights.save(teacher, tmp_path / "teacher")
    config.teacher.path = str(tmp_path / "teacher")
    config.loss.distillation_weight = 0.9
    figures = train_and_evaluate(config, tmp_path / "run", run=on_one_device(config))
    assert figures["step"] == 2
    (line,) = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    mixed = 0.9 * line["distillation_loss"] + 0.1 * line["label_loss"]
    assert line["loss"] == pytest.approx(mixed, rel=1e-6)

    teacher.variables["params"]["head"]["bias"] += 1
    config.teacher.path = str(tmp_path / "other")
    weights.save(teacher, tmp_path / "other")
    with pytest.raises(UserError, match="was started with another teacher"):
        train_and_evaluate(config, tmp_path / "run")


# --- devices -----------------------------------------------------------------------------------


def two_headed(data_dir: Path, weight: float) -> ConfigDict:
    config = tiny_config(data_dir)
    config.model = models.model_config(
        "deit",
        image_size=32,
        patch_size=8,
        num_classes=10,
        width=16,
        depth=1,
        num_heads=2,
        mlp_dim=32,
        distillation_token=True,
        distillation_head=True,
    )
    config.data.eval_resize = 32
    config.teacher.path = digits.get_config().teacher.path if weight else ""
    config.loss.distillation_weight = weight
    config.loss.teacher_targets = "hard"
    return config


@pytest.mark.slow
def test_a_distillation_head_learns_from_the_teacher_and_the_class_head_from_labels(data_dir: Path) -> None:
    run = on_one_device(two_headed(data_dir, 0.5))
    state = run.programs.create.run(jax.random.key(0), {})
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (144, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, 144).astype(np.int32),
    }
    _, metrics = run.programs.train.run(
        state, shard_batch(batch, run.mesh), run.teacher.variables, jax.random.key(1)
    )
    state = run.programs.create.run(jax.random.key(0), {})  # the step took the first one
    normalized = run.teacher.normalize(jnp.asarray(batch["image"]))
    answers = run.teacher.model.apply(run.teacher.variables, normalized).logits
    heads = run.model.apply({"params": state.params}, normalized).head_logits
    assert len(heads) == 2
    log_probabilities = [np.asarray(jax.nn.log_softmax(head)) for head in heads]
    expected = -np.mean(log_probabilities[1][np.arange(144), np.argmax(answers, -1)])
    assert float(metrics["distillation_loss"]) == pytest.approx(expected, rel=1e-4)
    # Label smoothing 0.1.
    of_labels = log_probabilities[0][np.arange(144), batch["label"]]
    expected = -0.9 * np.mean(of_labels) - 0.1 * np.mean(log_probabilities[0])
    assert float(metrics["label_loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["gradient_norm"]) > 0


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_distillation_head_needs_both(data_dir: Path, weight: float) -> None:
    with pytest.raises(UserError, match=r"config.model.distillation_head needs a teacher for one head"):
        build(two_headed(data_dir, weight), 1437)


def test_the_teacher_s_images_are_normalised_as_it_says(data_dir: Path, tmp_path: Path) -> None:
    config = two_headed(data_dir, 0.5)
    teacher = weights.load(Path(config.teacher.path))
    other = dataclasses.replace(teacher.preprocessing, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    weights.save(dataclasses.replace(teacher, preprocessing=other), tmp_path / "teacher")
    config.teacher.path = str(tmp_path / "teacher")
    loaded = load_teacher(config)
    assert (loaded.normalize.mean, loaded.normalize.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert loaded.digest == teacher.digest()


def ten_steps(config: ConfigDict, num_devices: int) -> tuple:
    """Returns the losses and the final state on a number of devices."""
    model = models.create_model(config.model, jnp.float64)
    schedule = optim.make_schedule(config.optim, batch_size=16, steps_per_epoch=10, epochs=2)
    optimizer = optim.make_optimizer(config.optim, schedule)
    step = make_train_step(model, optimizer, Normalization((0.5,) * 3, (0.5,) * 3))
    mesh = make_mesh(jax.devices()[:num_devices])
    compiled = jit_train_step(step, mesh)
    create = jax.jit(lambda key: create_state(key, model, optimizer, 16))
    state = jax.device_put(create(jax.random.key(0)), replicated(mesh))
    generator, losses = np.random.default_rng(0), []
    for _ in range(10):
        batch = {
            "image": generator.integers(0, 256, (16, 16, 16, 3), np.uint8),
            "label": generator.integers(0, 10, 16, np.int32),
        }
        batch["image"][:2] = 255  # what the first of eight devices sees has other means than all others
        state, metrics = compiled(state, shard_batch(batch, mesh), {}, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_one_and_eight_devices_agree(data_dir: Path) -> None:
    """In float64: in float32 a parameter without influence, such as a shift before a batch norm, follows the
    rounding noise of its gradient, which Adam scales up to the learning rate.
    """
    assert len(jax.devices()) >= 8
    config = tiny_config(data_dir)
    config.model = models.model_config(
        "react_deit",
        image_size=16,
        patch_size=4,
        num_classes=10,
        width=8,
        depth=1,
        num_heads=2,
        mlp_dim=16,
    )
    losses, state = ten_steps(config, 1)
    losses8, state8 = ten_steps(config, 8)
    np.testing.assert_allclose(losses, losses8, rtol=1e-5)
    for one, eight in zip(jax.tree.leaves(state), jax.tree.leaves(state8), strict=True):
        scale = np.max(np.abs(one), initial=1e-3)
        np.testing.assert_allclose(one, eight, rtol=0, atol=1e-5 * scale)


@pytest.mark.slow
def test_evaluation_in_groups_gives_the_same_sums() -> None:
    config = tiny.get_config()
    model = models.create_model(config.model)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.integers(0, 256, (8, 16, 16, 3), np.uint8),
        "label": generator.integers(0, 10, 8, np.int32),
        "mask": np.arange(8) < 7,
        "bad": np.full(8, -1, np.int32),
    }
    normalize = Normalization((0.5,) * 3, (0.5,) * 3)
    whole = jax.jit(partial(eval_step, EvalSettings(model, normalize)))(variables, batch)
    groups = jax.jit(partial(eval_step, EvalSettings(model, normalize, images_at_once=2)))(variables, batch)
    assert float(whole["images"]) == 7
    for name in whole:
        np.testing.assert_allclose(whole[name], groups[name], rtol=1e-5, err_msg=name)


COMPILES_BOTH_WAYS = """
import sys
import jax, numpy as np
from bvit_jax.runtime.arguments import parse_config
from bvit_jax.training.setup import build

create = build(parse_config(sys.argv[1:]), num_examples=1000).programs.create
thorough = create.function.lower(*create.arguments).compile({"xla_backend_optimization_level": 3})
states = [program(jax.random.key(0), {}) for program in (create.run, thorough)]
for fast, slow in zip(*map(jax.tree.leaves, states), strict=True):
    np.testing.assert_array_equal(fast, slow)
"""


@pytest.mark.slow
def test_compiling_in_less_time_changes_no_initial_weight() -> None:
    """In a process that compiles as runs do: these tests compile less thoroughly."""
    command = [sys.executable, "-c", COMPILES_BOTH_WAYS, "--config=digits"]
    hurried = {"XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    variables = {name: value for name, value in environment().items() if name not in hurried}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr
