"""The ranking loss against explicit pairs in numpy, and as a term of the training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax.config import validate
from bvit_jax.errors import UserError
from bvit_jax.losses import ranking
from bvit_jax.losses.attention import Ranking
from bvit_jax.losses.ordering import order_by_network, order_by_sort
from bvit_jax.losses.ranking import ranking_loss
from bvit_jax.models import Execution, create_model, model_config
from bvit_jax.plan import dry_run as dry_run_lib
from bvit_jax.runtime.mesh import make_mesh, replicated, shard_batch
from bvit_jax.training.setup import build
from bvit_jax.training.steps.state import create_state
from bvit_jax.training.teacher import load_teacher, make_ranking
from tests.configs import one_block
from tests.processes import ROOT
from tests.small import NORMALIZE, assert_close, jit_train_step, make_train_step, optimizer, wide
from tests.tiny_models import abstract_of, random_variables

KEY = jax.random.key(3)
DEIT = {"image_size": 16, "patch_size": 4, "num_classes": 5, "width": 8, "depth": 4, "num_heads": 2}
DEIT |= {"mlp_dim": 16}
SWIN = {"image_size": 16, "patch_size": 2, "num_classes": 5, "width": 8, "depth": (2, 2), "num_heads": (1, 2)}
SWIN |= {"window_size": 4}


def probabilities(*shape, seed=0):
    scores = np.random.default_rng(seed).normal(size=shape)
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def by_pairs(student, teacher, shift, margin):
    """Returns the loss of a layer (..., keys) and its gradient, one pair after the other."""
    n = student.shape[-1]
    rows = list(zip(student.reshape(-1, n), teacher.reshape(-1, n), strict=True))
    loss, gradient = 0.0, np.zeros((len(rows), n))
    for row, (s, t) in enumerate(rows):
        order = np.argsort(t, kind="stable")
        pairs = [*zip(order[1:], order[:-1]), *((j, (j + shift) % n) for j in range(n))]
        pairs = [(j, k, np.sign(t[j] - t[k])) for j, k in pairs if t[j] != t[k]]
        for j, k, sign in pairs:
            term = margin - (s[j] - s[k]) * sign * n
            if term > 0:
                loss += term / len(pairs)
                gradient[row, j] -= sign * n / len(pairs)
                gradient[row, k] += sign * n / len(pairs)
    return loss / len(rows), gradient.reshape(student.shape) / len(rows)


def shift_of(key, layers, layer, keys):
    return int(jax.random.randint(jax.random.split(key, layers)[layer], (), 1, keys))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("keys", [2, 3, 17, 64, 65])
@pytest.mark.parametrize("margin", [0.1, 2.0])
def test_equals_explicit_pairs(keys, margin):
    shape = (2, 3, 4, keys)
    students = [probabilities(*shape, seed=seed) for seed in (0, 1)]
    teachers = [probabilities(*shape, seed=seed) for seed in (2, 3)]
    teachers[1][..., keys // 2 :] = teachers[1][..., -1:]  # ties
    loss_of = functools.partial(ranking_loss, key=KEY, margin=margin)
    loss, (gradients, taught) = jax.jit(jax.value_and_grad(loss_of, (0, 1)))(students, teachers)
    found = [
        by_pairs(s, t, shift_of(KEY, 2, layer, keys), margin)
        for layer, (s, t) in enumerate(zip(students, teachers))
    ]
    np.testing.assert_allclose(loss, np.mean([value for value, _ in found]), rtol=1e-12)
    for gradient, (_, expected) in zip(gradients, found):
        np.testing.assert_allclose(gradient, expected / 2, rtol=1e-12, atol=1e-15)
    assert all(not np.any(gradient) for gradient in taught)
    np.testing.assert_allclose(jax.jit(loss_of)(students, teachers), loss, rtol=1e-12)  # without a gradient


@pytest.mark.parametrize("keys", [1, 2, 7, 64, 198])
@pytest.mark.parametrize("order_of", [order_by_sort, order_by_network])
def test_the_order_is_a_stable_sort(order_of, keys):
    values = jnp.asarray(probabilities(7, keys), jnp.bfloat16).at[:, 50:60].set(0)
    np.testing.assert_array_equal(
        jax.jit(order_of)(values), np.argsort(np.asarray(values, np.float32), kind="stable")
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 60])
def test_blocks_of_rows_change_nothing(batch):
    student, teacher = (jnp.asarray(probabilities(batch, 35, 9, seed=seed), jnp.float32) for seed in (0, 1))
    arguments = student, teacher, jnp.int32(4)
    blocks = jax.jit(functools.partial(ranking._compare_in_blocks, margin=0.1))(*arguments)
    whole = ranking._compare_rows(*arguments, order_of=order_by_sort, margin=0.1)
    np.testing.assert_allclose(blocks[0], whole[0], rtol=1e-5)
    np.testing.assert_array_equal(blocks[1], whole[1])
    np.testing.assert_array_equal(blocks[2], whole[2])


@pytest.mark.slow
def test_narrow_probabilities_give_a_wide_loss():
    narrow = [jnp.asarray(probabilities(1, 2, 5, 9, seed=seed), jnp.bfloat16) for seed in (0, 1)]
    loss, gradient = jax.value_and_grad(lambda s: ranking_loss([s], [narrow[1]], KEY))(narrow[0])
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    wide_loss = ranking_loss([narrow[0].astype(jnp.float32)], [narrow[1].astype(jnp.float32)], KEY)
    assert loss == wide_loss > 0


@pytest.mark.slow
def test_zero_once_the_orders_agree_by_the_margin():
    teacher = jnp.asarray(probabilities(2, 2, 5, 20))
    ranks = jnp.argsort(jnp.argsort(teacher, axis=-1), axis=-1)
    student = 0.11 / 20 * ranks.astype(float)  # neighbours differ by a little more than the margin
    loss, gradient = jax.value_and_grad(lambda s: ranking_loss([s], [teacher], KEY))(student)
    assert loss == 0
    assert not jnp.any(gradient)
    assert ranking_loss([student], [teacher], KEY, margin=0.12) > 0


@pytest.mark.slow
def test_ties_of_the_teacher_have_no_order():
    student, equal = jnp.asarray(probabilities(1, 1, 4, 6)), jnp.full((1, 1, 4, 6), 1 / 6)
    loss, gradient = jax.value_and_grad(lambda s: ranking_loss([s], [equal], KEY))(student)
    assert loss == 0
    assert not jnp.any(gradient)


def test_one_key_has_no_order():
    assert ranking_loss([jnp.ones((2, 1, 3, 1))], [jnp.ones((2, 1, 3, 1))], KEY) == 0


@pytest.mark.slow
def test_gradient_descent_restores_a_swapped_pair():
    teacher = jnp.asarray([0.4, 0.3, 0.2, 0.1])[None, None, None]
    logits = jnp.log(teacher[..., jnp.array([0, 2, 1, 3])])

    @jax.jit
    def descend(logits, key):
        return logits - jax.grad(lambda x: ranking_loss([nn_softmax(x)], [teacher], key))(logits)

    nn_softmax = functools.partial(jax.nn.softmax, axis=-1)
    assert nn_softmax(logits)[0, 0, 0, 1] < nn_softmax(logits)[0, 0, 0, 2]
    for step in range(50):
        logits = descend(logits, jax.random.fold_in(KEY, step))
    assert jnp.all(jnp.diff(nn_softmax(logits)) < 0)
    assert ranking_loss([nn_softmax(logits)], [teacher], KEY) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_different_numbers_of_heads_are_averaged():
    student, teacher = probabilities(2, 3, 5, 9), probabilities(2, 6, 5, 9, seed=1)
    loss_of = jax.jit(lambda student, teacher: ranking_loss([student], [teacher], KEY))
    loss, gradient = jax.value_and_grad(loss_of)(student, teacher)
    expected, slopes = by_pairs(student.mean(1), teacher.mean(1), shift_of(KEY, 1, 0, 9), 0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, np.repeat(slopes[:, None], 3, axis=1) / 3, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_some_of_the_images_are_ranked():
    images, windows = (
        jnp.arange(n, dtype=float)[:, None, None, None] * jnp.ones((n, 2, 3, 3)) for n in (6, 24)
    )
    for every, kept in ((1, range(6)), (2, (0, 2, 4)), (3, (0, 3))):
        chosen = Ranking(1.0, every=every, layers=(0, 1)).chosen([images, windows, images], 6)
        assert len(chosen) == 2
        np.testing.assert_array_equal(chosen[0], images[jnp.array(kept)])
        np.testing.assert_array_equal(chosen[1], np.concatenate([windows[4 * i : 4 * i + 4] for i in kept]))


@pytest.mark.slow
def test_memory_grows_with_the_number_of_keys():
    def bytes_a_key(keys):
        shape = jax.ShapeDtypeStruct((1, 4, 64, keys), jnp.float32)
        compiled = jax.jit(jax.value_and_grad(lambda s, t: ranking_loss([s], [t], KEY))).lower(shape, shape)
        return compiled.compile().memory_analysis().temp_size_in_bytes / keys

    found = [bytes_a_key(keys) for keys in (49, 98, 197, 394)]
    assert max(found) < 1.35 * min(found)
    assert max(found) < 64 * 4 * 64  # bytes for each probability


# In models


@functools.cache
def sides(name):
    """Returns a student and a teacher of the same sizes, each with random variables."""
    student, teacher, sizes = {
        "deit": ("bivit_release_deit", "deit", DEIT | {"depth": 2, "distillation_token": True}),
        "swin": ("bivit_release_swin", "swin", SWIN | {"depth": (2,), "num_heads": (1,)}),
    }[name]
    heads = {"distillation_head": True} if name == "deit" else {}
    configs = model_config(student, **sizes, **heads), model_config(teacher, **sizes)
    return [(config, jax.tree.map(jnp.asarray, random_variables(abstract_of(config)))) for config in configs]


def images_and_labels(number=8, size=16):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (number, size, size, 3), np.uint8),
        "label": rng.integers(0, 5, number, np.int32),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit", "swin"])
def test_probabilities_are_those_before_binarisation(name):
    (config, variables), (teacher_config, teacher_variables) = sides(name)
    images = NORMALIZE(jnp.asarray(images_and_labels(2)["image"]))
    depth = np.sum(config.depth)
    for settings, values, binary in (
        (config, variables, True),
        (teacher_config, teacher_variables, False),
    ):
        output = jax.jit(functools.partial(create_model(settings).apply, capture=True))(values, images)
        assert len(output.probabilities) == len(output.attentions) == depth
        for probs, used in zip(output.probabilities, output.attentions):
            np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
            assert bool(jnp.all(probs == used)) is not binary
    plain = jax.eval_shape(create_model(config).apply, variables, images)
    assert plain.probabilities == ()


@pytest.mark.slow
def test_masked_keys_of_shifted_windows_have_no_order():
    _, (config, variables) = sides("swin")
    images = NORMALIZE(jnp.asarray(images_and_labels(2)["image"]))
    teacher = jax.jit(functools.partial(create_model(config).apply, capture=True))(
        variables, images
    ).probabilities
    assert jnp.mean(teacher[1] < ranking.FLOOR) > 0.2  # the block is shifted
    student = jnp.where(teacher[1] < ranking.FLOOR, 0, teacher[1])
    raised = student.at[..., ::2].add(jnp.where(student[..., ::2] == 0, 1e-3, 0))

    def loss(s):
        return ranking_loss([s], [teacher[1]], KEY, margin=1e-6)

    value, gradient = jax.value_and_grad(loss)(student)
    assert value == 0
    assert not jnp.any(gradient)
    # What they are only counts next to the keys that are not masked.
    assert loss(raised) < 0.1


@functools.cache
def run(name, ranking_term, *, accumulate_steps=1, devices=1, weight=0.5, **execution):
    """Returns the gradient step's metrics and the state after it, in float64."""
    (config, variables), (teacher_config, teacher_variables) = sides(name)
    student = create_model(config, jnp.float64, Execution(**execution))
    scan = Execution(scan_blocks=execution.get("scan_blocks", False))
    teacher = create_model(teacher_config, jnp.float64, scan)
    mesh = make_mesh(jax.devices()[:devices])
    step = make_train_step(
        student,
        optimizer(),
        NORMALIZE,
        teacher=teacher,
        distillation_weight=weight,
        ranking=ranking_term,
        accumulate_steps=accumulate_steps,
        mesh=mesh,
    )
    state = jax.jit(lambda key: create_state(key, student, optimizer(), config.image_size))(KEY)
    state = wide(state.replace(**variables))
    arguments = jax.device_put((state, wide(teacher_variables), KEY), replicated(mesh))
    compiled = (
        jit_train_step(step, mesh, donate=False)
        .lower(arguments[0], shard_batch(images_and_labels(), mesh), *arguments[1:])
        .compile()
    )
    state, metrics = compiled(arguments[0], shard_batch(images_and_labels(), mesh), *arguments[1:])
    return jax.device_get((metrics, state.params)), compiled


@pytest.mark.slow
@pytest.mark.usefixtures("x64", "promotion")
def test_the_loss_is_the_sum_of_its_terms():
    plain, _ = run("deit", None)
    ranked, _ = run("deit", Ranking(3.0, layers=(1,)))
    assert "ranking_loss" not in plain[0]
    np.testing.assert_allclose(
        ranked[0]["loss"], plain[0]["loss"] + 3 * ranked[0]["ranking_loss"], rtol=1e-12
    )
    assert ranked[0]["ranking_loss"] > 0
    assert ranked[0]["gradient_norm"] != plain[0]["gradient_norm"]
    alone, _ = run("deit", Ranking(3.0, layers=(1,)), weight=0.0)
    assert set(alone[0]) == {"loss", "label_loss", "ranking_loss", "train_top1", "gradient_norm"}
    np.testing.assert_allclose(alone[0]["label_loss"], plain[0]["label_loss"], rtol=1e-12)
    np.testing.assert_allclose(alone[0]["ranking_loss"], ranked[0]["ranking_loss"], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64", "promotion")
@pytest.mark.parametrize("name", ["deit", "swin"])
def test_remat_scans_and_devices_change_nothing(name):
    plain, _ = run(name, Ranking(1.0))
    assert_close(run(name, Ranking(1.0), remat="block", scan_blocks=True)[0], plain, rtol=1e-9)
    spread, compiled = run(name, Ranking(1.0), devices=8)
    assert_close(spread, plain, rtol=1e-9)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.slow
@pytest.mark.usefixtures("x64", "promotion")
def test_microbatches_are_ranked_by_themselves():
    (metrics, _), _ = run("deit", Ranking(1.0), accumulate_steps=2, devices=2)
    (once, _), _ = run("deit", Ranking(1.0))
    assert metrics["ranking_loss"] > 0
    # Other random pairs: close, and not the same.
    np.testing.assert_allclose(metrics["ranking_loss"], once["ranking_loss"], rtol=0.2)
    assert metrics["ranking_loss"] != once["ranking_loss"]


# Settings


def config_of(name="bivit_release_deit", **loss):
    config = one_block.get_config()
    sizes = DEIT | {"num_classes": 10, "distillation_head": False, "distillation_token": True}
    config.model = model_config(name, **sizes)
    config.loss.update({"ranking_weight": 1.0, **loss})
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ranking_weight", -1.0, "config.loss.ranking_weight is -1.0; expected a number of at least 0"),
        ("ranking_margin", 0.0, "config.loss.ranking_margin is 0.0; expected a number above 0"),
        ("ranking_every", 5, "config.loss.ranking_every is 5; expected a whole number that divides the"),
        ("ranking_layers", (0, 0), "config.loss.ranking_layers is (0, 0); expected () or different"),
        ("ranking_layers", (-1,), "config.loss.ranking_layers is (-1,); expected () or different"),
    ],
)
def test_settings_out_of_range(key, value, message):
    with pytest.raises(UserError) as error:
        validate(config_of(**{key: value}))
    assert message in str(error.value)


def teacher_of(**settings):
    return create_model(model_config("deit", **{**DEIT, "distillation_token": True, **settings}))


@pytest.mark.slow
def test_what_student_and_teacher_must_share():
    def fails(teacher, *messages, **loss):
        config = config_of(**loss)
        with pytest.raises(UserError) as error:
            make_ranking(config, create_model(config.model), teacher)
        assert all(message in str(error.value) for message in messages)

    fails(teacher_of(depth=3), "the student has 4 blocks, the teacher 3", "config.loss.ranking_layers")
    fails(teacher_of(), "config.loss.ranking_layers is (1, 4)", "has 4 blocks", ranking_layers=(1, 4))
    fails(
        teacher_of(distillation_token=False),
        "block 0 of the student has 18 tokens and 18 keys, that of the teacher 17 tokens and 17 keys",
    )
    config = config_of(ranking_layers=(0, 2))
    assert make_ranking(config, create_model(config.model), teacher_of(depth=3, num_heads=4)) == Ranking(
        weight=1.0, margin=0.1, layers=(0, 2), every=2
    )
    config.loss.ranking_weight = 0.0
    assert make_ranking(config, create_model(config.model), teacher_of()) is None


def test_a_teacher_is_needed_for_either_term():
    config = config_of(distillation_weight=0.0)
    with pytest.raises(
        UserError, match=r"config.teacher.path is empty.*labels with config.loss.ranking_weight=0"
    ):
        load_teacher(config)
    config.loss.distillation_weight = 0.5
    with pytest.raises(UserError, match=r"distillation_weight=0 and config.loss.ranking_weight=0"):
        load_teacher(config)
    config.loss.distillation_weight = config.loss.ranking_weight = 0.0
    config.teacher.path = str(ROOT / "bvit_jax" / "assets" / "deit_digits")
    with pytest.raises(
        UserError, match=r"raise it or config.loss.ranking_weight, or leave config.teacher.path"
    ):
        load_teacher(config)


@pytest.mark.slow
@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("name", ["bivit_release_deit", "bivit_release_swin"])
def test_a_dry_run_ranks_against_the_real_valued_backbone(name, caplog):
    config = config_of(distillation_weight=0.0)
    if name == "bivit_release_swin":
        config.model = model_config(name, **SWIN | {"num_classes": 10})
    teacher = dry_run_lib._teacher(config)
    assert "of the student's sizes in its place" in caplog.text
    run_ = build(config, 0, teacher=teacher)
    assert type(run_.teacher.model) is type(create_model({"name": name.removeprefix("bivit_release_")}))
    train = run_.programs.train
    jax.eval_shape(train.function, *train.arguments)
