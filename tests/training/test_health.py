"""Figures of the binary layers: against slow formulations, on several devices, and at no cost elsewhere."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from bvit_jax import models
from bvit_jax.augment.augmentation import Augmentation
from bvit_jax.augment.erasing import Erasing
from bvit_jax.augment.mixing import Mixing
from bvit_jax.augment.normalization import Normalization
from bvit_jax.binary.estimators import PARABOLA
from bvit_jax.binary.weights import CONV, DENSE
from bvit_jax.layers import dense, sown
from bvit_jax.layers import kernels as signs
from bvit_jax.models.bhvit import LevelQuantizer
from bvit_jax.models.blocks import BinaryAttention
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated
from bvit_jax.training.steps import health
from bvit_jax.training.steps.batch import Inputs
from bvit_jax.training.steps.programs import jit_health
from bvit_jax.training.steps.state import abstract_state, create_state
from bvit_jax.workdir.checkpoint import Checkpoints
from tests.small import jit_train_step, make_train_step
from tests.tiny_models import SMALLEST, images_for, spread_variables

SIZE, BATCH = 16, 16
TINY = {
    "name": "binaryvit",
    "image_size": SIZE,
    "num_classes": 10,
    "width": (8, 16),
    "depth": (1, 1),
    "num_heads": (2, 2),
    "mlp_dim": (16, 16),
    "reduction": (2, 1),
    "pool_branches": (),
    "dropout": 0.2,
}
BHVIT = {"name": "bhvit", "num_classes": 10, **SMALLEST["bhvit"]}
NORMALIZE = Normalization((0.5,) * 3, (0.25,) * 3)
AUGMENTATION = Augmentation(Erasing(), Mixing(mixup_alpha=0.8))
OPTIMIZER = optax.sgd(0.05)
KEY = jax.random.key(3)


def batch(seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
    return {"image": images, "label": generator.integers(0, 10, BATCH).astype(np.int32)}


class Program:
    """A training step and the pass that measures it, on some devices."""

    def __init__(self, devices, **settings):
        self.model = models.create_model({**TINY, **settings})
        self.mesh = make_mesh(jax.devices()[:devices])
        step = make_train_step(self.model, OPTIMIZER, NORMALIZE, augmentation=AUGMENTATION)
        self.step = jit_train_step(step, self.mesh)
        self.health = jit_health(self.model, Inputs(NORMALIZE, AUGMENTATION), 1, self.mesh)
        self.key = self.on_devices(KEY)
        self.initial = None

    def state(self, step=0):
        """Returns the initial state, as if it were that after some steps, as arrays of NumPy."""
        create = functools.partial(create_state, model=self.model, optimizer=OPTIMIZER, image_size=SIZE)
        self.initial = self.initial or jax.device_get(jax.jit(functools.partial(create, health=True))(KEY))
        return jax.tree.map(np.copy, self.initial).replace(step=np.int32(step))

    def on_devices(self, state):
        return jax.device_put(state, replicated(self.mesh))

    def batch(self, seed):
        return jax.device_put(batch(seed), batch_sharded(self.mesh))

    def train(self, state, steps):
        state = self.on_devices(state)
        for _ in range(steps):
            state, _ = self.step(state, self.batch(int(state.step)), {}, self.key)
        return state

    def measure(self, state):
        """Returns the figures after a step, and the state that counts flips from here on."""
        state = self.on_devices(state)
        figures, packed = self.health(state, self.batch(int(state.step) - 1), self.key)
        return health.per_layer(figures), state.replace(signs=packed)


@pytest.fixture(scope="module")
def program():
    return Program(devices=1)


# --- weights -----------------------------------------------------------------------------------

KERNELS = {("a", "dense"): DENSE, ("conv",): CONV}


def params_of(dense, conv):
    return {"a": {"dense": {"kernel": jnp.float32(dense)}}, "conv": {"kernel": jnp.float32(conv)}}


@pytest.mark.slow
def test_flips_are_those_of_the_quantisers_signs():
    generator = np.random.default_rng(0)
    dense, conv = generator.normal(size=(7, 5)), 1 + np.abs(generator.normal(size=(2, 2, 3, 5)))
    packed = signs.pack_signs(params_of(dense, conv), KERNELS)
    assert {x.dtype for x in jax.tree.leaves(packed)} == {np.dtype(np.uint8)}
    assert packed["a"]["dense"].shape == (5,)  # 35 bits
    # The same constant for all weights of an output channel: the centred weights are the same.
    assert signs.flipped(packed, params_of(dense + 9, conv), KERNELS) == {"a/dense": 0, "conv": 0}
    assert signs.flipped(packed, params_of(dense, conv - 99), KERNELS) == {"a/dense": 0, "conv": 1}
    conv[0, 1, 2, :3] *= -1
    found = signs.flipped(packed, params_of(-dense, conv), KERNELS)
    assert found == {"a/dense": 1, "conv": pytest.approx(3 / 60)}


def test_a_zero_counts_as_negative():
    def packed(value):
        return signs.pack_signs(params_of(np.zeros((2, 2)), np.full((1, 1, 2, 2), value)), KERNELS)

    after_zero = params_of(np.zeros((2, 2)), np.zeros((1, 1, 2, 2)))
    assert signs.flipped(packed(-1.0), after_zero, KERNELS)["conv"] == 0
    assert signs.flipped(packed(1.0), after_zero, KERNELS)["conv"] == 1


def test_active_weights_are_those_that_get_a_gradient():
    dense = np.array([[3.0, 1, 0], [1, 0, 0], [2, 2, 0]])  # centred on its columns: 1, -1, 0; 0, -1, 1; 0
    conv = np.array([1.0, -1, 1.5, -7]).reshape(1, 1, 2, 2)
    found = signs.active_weights(params_of(dense, conv), KERNELS)
    assert found == {"a/dense": 1, "conv": 0.5}
    assert signs.active_weights(params_of(2 * dense, conv), KERNELS)["a/dense"] == pytest.approx(5 / 9)


# --- which layers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({}, 7 + 6 + 1),  # the second stage has no reduction; one binary convolution between them
        ({"some_fp": True}, 7 + 6),
        ({"act_bits": 32}, 7 + 6 + 1),
        ({"weight_bits": 2}, 0),
        # Three convolutions in two blocks, four products in two, two in every feed-forward; three between.
        (BHVIT, 2 * 3 + 2 * 4 + 4 * 2 + 3),
    ],
)
def test_kernels_of_one_bit_follow_from_the_model(settings, kernels):
    model = models.create_model(settings if "name" in settings else TINY | settings)
    mesh = make_mesh()
    state = abstract_state(model, OPTIMIZER, SIZE, mesh, health=True)
    leaves = jax.tree.leaves(state.signs)
    assert len(leaves) == kernels
    assert abstract_state(model, OPTIMIZER, SIZE, mesh).signs == {}
    assert all(leaf.sharding == replicated(mesh) and leaf.dtype == np.uint8 for leaf in leaves)


@pytest.mark.slow
def test_layers_are_found_where_blocks_are_rematerialised():
    class Remat(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(dense.BinaryDense)(5, name="dense")(x)

    x = jnp.linspace(-2, 2, 24).reshape(2, 3, 4)
    with signs.noted_kernels() as kernels:
        variables = Remat().init(KEY, x)
    assert kernels == {("dense",): DENSE}
    assert list(variables) == ["params"]
    _, found = Remat().apply(variables, x, mutable=[sown.COLLECTION])
    assert float(found["health"]["dense"]["active_inputs"][""]) == 0.5


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_real_models_have_no_figures(name):
    small = {"image_size": 16, "patch_size": 4, "num_classes": 10, "width": 8}
    own = {"depth": 1, "num_heads": 1, "mlp_dim": 8}
    if name == "swin":
        own = {"depth": (1,), "num_heads": (1,), "window_size": 2}
    model = models.create_model({"name": name, **small, **own})
    state = abstract_state(model, OPTIMIZER, SIZE, make_mesh(jax.devices()[:1]), health=True)
    assert state.signs == {}
    lowered = jit_health(model, Inputs(NORMALIZE), 1, make_mesh(jax.devices()[:1])).lower(state, batch(), KEY)
    figures, packed = lowered.out_info
    assert figures.names == ()
    assert packed == health.totals({}) == {}
    assert "dot" not in lowered.as_text()  # nothing is left of the pass


# --- activations -------------------------------------------------------------------------------


def slow_figures(model, state, images, dropout_key):
    """Returns the figures of activations from what enters the layers, in NumPy."""

    def inputs_of(params, batch_stats, images):
        inputs = {}

        def note(call, args, kwargs, context):
            result, module = call(*args, **kwargs), context.module
            if isinstance(module, dense.BinaryDense | dense.BinaryPatchConv):
                inputs["/".join(module.path)] = args[0] + module.variables["params"]["move"].reshape(-1)
            if isinstance(module, BinaryAttention) and context.method_name == "_heads":
                inputs["/".join([*module.path, args[1]])] = result
            return result

        variables = {"params": params, "batch_stats": batch_stats}
        with nn.intercept_methods(note):
            model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key})
        return inputs

    inputs = jax.device_get(jax.jit(inputs_of)(state.params, state.batch_stats, images))
    return (
        {name: np.mean(np.abs(x) < 1) for name, x in inputs.items()},
        {name: np.mean(x == 0) for name, x in inputs.items()},
    )


@pytest.mark.slow
def test_figures_are_those_of_the_step_before(program):
    state = program.state(step=2)  # two steps taken: the last had the number 1
    state.params["downsample1"]["conv"]["move"][..., :2] = 2
    attention = state.params["block0"]["attention"]
    attention["query"]["dense"]["kernel"] *= 0  # with the next two, the query is its shift alone
    attention["query"]["rprelu"]["slope"] *= 0
    attention["query"]["rprelu"]["move1"] += 99
    found, _ = program.measure(state)

    step_key = jax.random.fold_in(KEY, 1)
    images = jnp.asarray(batch(1)["image"])
    pictures, _ = AUGMENTATION(jax.random.fold_in(step_key, 1), images, NORMALIZE)
    active, zeros = slow_figures(program.model, state, NORMALIZE(pictures), step_key)
    assert len(active) == 14 + 2 * 3
    assert zeros["block0/attention/query_move"] == 1
    assert min(active.values()) < 0.6 < max(active.values())
    # Rounding moves single activations over an edge.
    assert found["active_inputs"] == pytest.approx(active, abs=2e-3)
    assert found["zeros"] == pytest.approx(zeros, abs=1e-6)
    assert set(found["flipped"]) == set(found["active_weights"])


@pytest.mark.slow
def test_under_accumulation_the_first_microbatch_is_measured(program):
    state = program.state(step=2)
    measured = jit_health(program.model, Inputs(NORMALIZE, AUGMENTATION), 2, program.mesh)
    figures, _ = measured(program.on_devices(state), program.batch(1), program.key)
    step_key = jax.random.fold_in(KEY, 1)
    images = jnp.asarray(batch(1)["image"])
    pictures, _ = AUGMENTATION(jax.random.fold_in(step_key, 1), images, NORMALIZE)
    dropout_key = jax.random.fold_in(jax.random.fold_in(step_key, 2), 0)
    active, _ = slow_figures(program.model, state, NORMALIZE(pictures[::2]), dropout_key)
    assert health.per_layer(figures)["active_inputs"] == pytest.approx(active, abs=4e-3)


class Told(nn.Module):
    """A layer that reports whatever it is given."""

    def __call__(self, x):
        sown.watch_sign(self, x, PARABOLA)
        sown.watch_heads(self, x)


def test_zeros_and_dead_heads_by_hand():
    codes = np.zeros((3, 4, 2, 2), np.float32)  # heads 0 and 2 attend to nothing
    codes[2, 1, 0, 1] = codes[0, 3, 1, 1] = 1
    _, found = Told().apply({}, jnp.asarray(codes), mutable=["health"])
    assert found["health"]["dead_heads"] == {"": 2}
    assert float(found["health"]["zeros"][""]) == pytest.approx(46 / 48)
    # At -1 and 1 the slope is zero.
    assert float(found["health"]["active_inputs"][""]) == pytest.approx(46 / 48)


def test_a_share_of_more_than_float32_counts():
    mask = jax.ShapeDtypeStruct((64, 1024, 1024), bool)
    text = jax.jit(sown.share).lower(mask).as_text()
    assert "tensor<64xi32>" in text  # samples are counted in whole numbers
    ones = jnp.ones((5, 1 << 22), bool)  # 1.25 times 2^24
    assert float(sown.share(ones)) == 1


def test_a_large_scale_kills_the_heads(program):
    state = program.state(step=1)
    found, _ = program.measure(state)
    assert found["dead_heads"] == {"block0/attention": 0, "block1/attention": 0}
    state.params["block1"]["attention"]["prob_scale"] = np.float32(10)
    found, _ = program.measure(state)
    assert found["dead_heads"] == {"block0/attention": 0, "block1/attention": 2}
    assert health.totals(found)["dead_heads"] == 2


def test_levels_and_steps_by_hand():
    class Levels(nn.Module):
        def __call__(self, codes, scale):
            sown.watch_levels(self, codes, scale)

    codes = jnp.array([0, 0, 0, 1, 3, 3, 0, 0], jnp.float32).reshape(2, 1, 2, 2)
    scale = jnp.array([0.1, 0, -0.1, np.nan])
    _, found = Levels().apply({}, codes, scale, mutable=["health"])
    shares = {name: float(value[""]) for name, value in found["health"].items()}
    assert shares == {"level_0": 5 / 8, "level_1": 1 / 8, "level_2": 0, "level_3": 2 / 8} | {
        "nonpositive_scales": 3
    }


def test_totals():
    found = {"zeros": {"a": 0.5, "b": 0.0}, "dead_heads": {"a": 1.0, "b": 2.0}, "flipped": {"a": 0.25}}
    assert list(health.totals(found).items()) == [("flipped", 0.25), ("zeros", 0.25), ("dead_heads", 3)]


@pytest.mark.parametrize(
    ("every", "epoch", "steps"),
    [(3, 9, [9, 18]), (4, 9, [12, 18]), (100, 9, [18]), (9, 9, [9, 18]), (5, 2, [5, 10, 15, 18])],
)
def test_figures_of_all_layers_come_once_an_epoch(every, epoch, steps):
    logs = [step for step in range(1, 19) if step % every == 0 or step == 18]
    assert [step for step in logs if health.layers_due(step, every, epoch)] == steps


# --- BHViT -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bhvit():
    """Returns a BHViT, variables, images, and a function to its figures and what some layers are given."""
    config = models.model_config(**BHVIT)
    model = models.create_model(config)
    images = images_for(config)

    @jax.jit
    def found(variables):
        given = {}

        def note(call, args, kwargs, context):
            module = context.module
            if isinstance(module, dense.BinaryConv):
                given["/".join(module.path)] = args[0] + args[1]
            if isinstance(module, LevelQuantizer):
                given["/".join(module.path)] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            _, updates = model.apply(variables, images, train=True, mutable=["batch_stats", "health"])
        return updates["health"], given

    def figures(variables):
        collection, given = jax.device_get(found(variables))
        return health_of(collection), given

    return model, spread_variables(model, config), images, figures


def health_of(collection):
    """Returns ``{kind: {layer: value}}``."""
    layers = {}
    for path, value in flatten_dict(collection).items():
        *layer, kind, part = path
        layers.setdefault(kind, {})["/".join([*layer, part] if part else layer)] = float(value)
    return layers


@pytest.mark.slow
def test_the_layers_of_bhvit(bhvit):
    model, variables, images, figures = bhvit
    with signs.noted_kernels() as kernels:
        jax.eval_shape(lambda v: model.apply(v, images), variables)
    found, _ = figures(variables)
    layers = {"/".join(path) for path in kernels}
    moves = {f"block{i}/attention/{name}_move" for i in (2, 3) for name in ("query", "key", "value")}
    assert set(found["active_inputs"]) == set(found["zeros"]) == layers | moves
    assert {f"block{i}/mixer/conv{j}" for i in (0, 1) for j in (1, 2, 3)} < layers
    steps = {"block2/attention/prob_act", "block3/attention/prob_act"}
    assert set(found["nonpositive_scales"]) == set(found["level_0"]) == steps
    for step in steps:
        assert sum(found[f"level_{i}"][step] for i in range(4)) == pytest.approx(1)
    assert set(health.totals(found)) < set(health.KINDS)


@pytest.mark.slow
def test_signs_before_grouped_convolutions_and_levels(bhvit):
    """What each convolution and each quantiser was given, in NumPy."""
    _, variables, _, figures = bhvit
    found, given = figures(variables)
    assert len(given) == 2 * 3 + 2
    for path, value in given.items():
        if path.endswith("prob_act"):
            own = functools.reduce(lambda tree, name: tree[name], path.split("/"), variables["params"])
            step, zero_point = (np.reshape(own[name], (-1, 1, 1)) for name in ("alpha", "zero_point"))
            codes = np.clip(np.round(value / step + zero_point), 0, 3)
            shares = [found[f"level_{i}"][path] for i in range(4)]
            assert shares == pytest.approx([np.mean(codes == i) for i in range(4)], abs=4e-3)
            assert found["nonpositive_scales"][path] == np.sum(step <= 0)
        else:
            assert found["active_inputs"][path] == pytest.approx(np.mean(np.abs(value) < 1), abs=4e-3)
            assert found["zeros"][path] == np.mean(value == 0)


@pytest.mark.slow
def test_steps_that_are_not_positive_are_counted(bhvit):
    _, variables, _, figures = bhvit
    attention = variables["params"]["block3"]["attention"]
    for alpha, zero_point, lost, dead in (([0.1, 0.2], 0, 0, 0), ([-0.1, 0.2], 0, 1, 1), ([0, 0.2], 0, 1, 0)):
        attention["prob_act"] = {"alpha": jnp.array(alpha), "zero_point": jnp.full(2, float(zero_point))}
        found, _ = figures(variables)
        assert found["nonpositive_scales"]["block3/attention/prob_act"] == lost
        assert found["dead_heads"]["block3/attention"] == dead


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_on_eight_devices(program):
    eight = Program(devices=8)
    states = (p.state(step=1) for p in (program, eight))
    figures = [p.measure(state)[0] for p, state in zip((program, eight), states)]
    for kind in figures[0]:
        # Batch norms over eight devices round otherwise, which moves single values over an edge.
        assert figures[1][kind] == pytest.approx(figures[0][kind], abs=2e-3), kind


@pytest.mark.slow
def test_a_run_that_continues_gives_the_same_figures(program, tmp_path):
    state = program.train(program.state(), 2)
    _, state = program.measure(state)
    at_log = jax.tree.map(np.asarray, state.signs)
    state = program.train(state, 1)
    jax.tree.map(np.testing.assert_array_equal, at_log, state.signs)

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, state, {})
    abstract = abstract_state(program.model, OPTIMIZER, SIZE, program.mesh, health=True)
    whole, _ = program.measure(program.train(state, 1))
    restored = checkpoints.restore(abstract)
    checkpoints.close()
    continued, _ = program.measure(program.train(restored[0], 1))
    assert continued == whole
    assert max(whole["flipped"].values()) > 0


@pytest.mark.slow
def test_the_training_step_is_the_same_program_without_watching(monkeypatch):
    model = models.create_model(TINY)
    step = make_train_step(model, OPTIMIZER, NORMALIZE)
    state = jax.eval_shape(lambda key: create_state(key, model, OPTIMIZER, SIZE), KEY)

    def program_text():
        fresh = jax.make_jaxpr(lambda *arguments: step(*arguments))  # else the first trace comes again
        return re.sub("0x[0-9a-f]+", "", str(fresh(state, batch(), {}, KEY)))

    text = program_text()
    with monkeypatch.context() as patch:
        for name in ("watch_sign", "watch_heads"):
            patch.setattr(sown, name, lambda *arguments: None)
        assert program_text() == text
    monkeypatch.setattr(sown, "watched", lambda module: True)  # the comparison can tell
    assert program_text() != text
