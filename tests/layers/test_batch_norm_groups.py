"""Batch norms over groups of images: against a loop over groups and PyTorch, on one and eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bvit_jax import models
from bvit_jax.errors import UserError
from bvit_jax.layers.norm import BatchNorm
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated
from bvit_jax.weights.state_dicts import abstract_variables
from tests.tiny_models import images_for, smallest

GROUPS, GROUP = 3, 4


def inputs(dtype=np.float64, groups=GROUPS):
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal((groups * GROUP, 5, 6)).astype(dtype) for _ in range(2))
    x *= 1 + np.arange(len(x))[:, None, None]  # so that groups differ
    params = {"scale": rng.standard_normal(6), "bias": rng.standard_normal(6)}
    stats = {"mean": rng.standard_normal(6), "var": 1 + rng.random(6)}
    return x, weights, {"params": params, "batch_stats": stats}


def value_and_gradients(module, x, weights, variables):
    """Returns the output, the statistics, and the gradients of a weighted sum of the outputs."""
    x, variables = jax.tree.map(jnp.asarray, (x, variables))

    def loss(params, x):
        y, updates = module.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * weights), (y, updates["batch_stats"])

    (_, (y, stats)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return y, stats, grads


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_equals_a_loop_over_groups():
    x, weights, variables = inputs()
    y, stats, (to_params, to_x) = value_and_gradients(BatchNorm(group=GROUP), x, weights, variables)
    parts = [
        value_and_gradients(BatchNorm(), x[i : i + GROUP], weights[i : i + GROUP], variables)
        for i in range(0, len(x), GROUP)
    ]
    np.testing.assert_allclose(y, np.concatenate([part[0] for part in parts]), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(to_x, np.concatenate([part[2][1] for part in parts]), rtol=1e-10, atol=1e-12)
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            stats[name], np.mean([part[1][name] for part in parts], axis=0), rtol=1e-12
        )
    for name in ("scale", "bias"):
        np.testing.assert_allclose(to_params[name], sum(part[2][0][name] for part in parts), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_equals_the_batch_norms_of_torch():
    torch = pytest.importorskip("torch")
    x, weights, variables = inputs()
    y, stats, (to_params, to_x) = value_and_gradients(BatchNorm(group=GROUP), x, weights, variables)
    params = {name: torch.tensor(a, requires_grad=True) for name, a in variables["params"].items()}
    total, outputs, means, variances = 0.0, [], [], []
    theirs = torch.tensor(x, requires_grad=True)
    for i in range(0, len(x), GROUP):
        mean, var = (torch.tensor(variables["batch_stats"][name]) for name in ("mean", "var"))
        group = theirs[i : i + GROUP].reshape(-1, 6)
        out = torch.nn.functional.batch_norm(group, mean, var, params["scale"], params["bias"], training=True)
        total = total + (out * torch.from_numpy(weights[i : i + GROUP].reshape(-1, 6))).sum()
        outputs.append(out.detach().numpy().reshape(GROUP, 5, 6))
        means.append(mean.numpy())
        variances.append(var.numpy())
    total.backward()
    np.testing.assert_allclose(y, np.concatenate(outputs), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(to_x, theirs.grad.numpy(), rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(stats["mean"], np.mean(means, axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats["var"], np.mean(variances, axis=0), rtol=1e-12)
    for name, values in params.items():
        np.testing.assert_allclose(to_params[name], values.grad.numpy(), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_group_of_the_whole_batch_is_the_batch():
    x, weights, variables = inputs()
    grouped = value_and_gradients(BatchNorm(group=len(x)), x, weights, variables)
    whole = value_and_gradients(BatchNorm(), x, weights, variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), grouped, whole)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("group", [2, 4, 16])
def test_one_and_eight_devices_agree(group):
    """Whether a device holds several groups, one, or a part of one."""
    x, weights, variables = inputs(groups=8)
    results = []
    for devices in (1, 8):
        mesh = make_mesh(jax.devices()[:devices])
        sharded, whole = batch_sharded(mesh), replicated(mesh)

        def call(x, weights, variables):
            return value_and_gradients(BatchNorm(group=group), x, weights, variables)

        results.append(jax.jit(call, in_shardings=(sharded, sharded, whole))(x, weights, variables))
    one, eight = jax.device_get(results)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), one, eight)


TINY = {
    "width": 8,
    "depth": 1,
    "num_heads": 2,
    "mlp_dim": 8,
    "image_size": 8,
    "patch_size": 4,
    "num_classes": 3,
}


def collectives(group, with_statistics):
    """Returns the collectives of a forward pass in training, on eight devices with four images each."""
    mesh = make_mesh()
    model = models.create_model(models.model_config("react_deit", batch_norm_group=group, **TINY))
    variables = abstract_variables(model, 8)
    images = jax.ShapeDtypeStruct((32, 8, 8, 3), jnp.float32)

    def forward(variables, images):
        output, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return (output.logits, updates) if with_statistics else output.logits

    whole, sharded = replicated(mesh), batch_sharded(mesh)
    compiled = jax.jit(forward, in_shardings=(whole, sharded)).lower(variables, images).compile()
    return re.findall(r"= .* (all-reduce|all-gather|all-to-all|collective-permute)\(", compiled.as_text())


@pytest.mark.slow
def test_normalising_within_a_device_needs_no_communication():
    assert not collectives(4, with_statistics=False)
    assert set(collectives(4, with_statistics=True)) == {"all-reduce"}
    assert "all-reduce" in collectives(0, with_statistics=False)


@pytest.mark.slow
def test_the_setting_reaches_every_batch_norm():
    for name in ("react_deit", "binaryvit"):
        model, config = smallest(name, batch_norm_group=3)
        variables = abstract_variables(model, config.image_size)
        norms = len(jax.tree.leaves(variables["batch_stats"])) // 2
        images = images_for(config, 6)

        def forward(variables, images, model=model):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])

        text = str(jax.make_jaxpr(forward)(variables, images))
        assert len(re.findall(r"name=batch_norm\b", text)) == norms


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_norm_group": -1}, "config.model.batch_norm_group is -1: expected a number of images, or 0"),
        ({"batch_norm_group": 4, "norm": "layer_norm"}, "config.model.batch_norm_group is 4: there are no"),
        ({"batch_norm_group": 2.0}, "config.model.batch_norm_group is 2.0: expected a whole number"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        models.create_model({"name": "react_deit", **TINY, **settings})


def test_a_group_that_does_not_divide_the_batch_is_refused():
    x, _, variables = jax.tree.map(jnp.asarray, inputs())
    with pytest.raises(ValueError, match=r"group is 5; expected a divisor of the 12 images"):
        BatchNorm(group=5).apply(variables, x, train=True, mutable=["batch_stats"])
    BatchNorm(group=5).apply(variables, x, train=False)
