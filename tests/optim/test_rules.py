"""Rules of learning rate and decay by path, against AdamW by hand and against PyTorch's groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bvit_jax import optim
from bvit_jax.errors import UserError
from bvit_jax.optim.rules import factors, parse_rules
from tests.optim.test_optim import schedule_of, settings

SHAPES = {
    "block0/dense/kernel": (4, 3),
    "block0/dense/bias": (3,),
    "block1/dense/kernel": (3, 4),
    "block10/dense/kernel": (2, 2),
    "head/kernel": (3, 2),
}
RULES = (
    ("head/.*", 10, 0.0),
    ("block0/.*", 0.5, 1.0),
    (r"block\d+/dense/kernel", 2.0, 0.25),
)
# The first rule that fits, for each parameter.
FACTORS = {
    "block0/dense/kernel": (0.5, 1.0),
    "block0/dense/bias": (0.5, 1.0),
    "block1/dense/kernel": (2.0, 0.25),
    "block10/dense/kernel": (2.0, 0.25),
    "head/kernel": (10, 0.0),
}


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape) for path, shape in SHAPES.items()}


def steps(config, schedule, number):
    """Yields the gradients and the parameters after each step."""
    optimizer = optim.make_optimizer(config, schedule)
    params = jax.tree.map(jnp.asarray, nested(parameters()))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(number):
        gradients = parameters(seed=step + 1)
        updates, state = update(nested(gradients), state, params)
        params = optax.apply_updates(params, updates)
        yield gradients, params


def config_with(rules=RULES):
    return settings(weight_decay=0.3, learning_rate=0.1, eps=1e-3, rules=rules)


def test_factors():
    rates, decays = factors(parse_rules(RULES), nested(parameters()))
    assert rates == nested({path: rate for path, (rate, _) in FACTORS.items()})
    assert decays == nested({path: decay for path, (_, decay) in FACTORS.items()})


@pytest.mark.usefixtures("x64")
def test_equals_adamw_by_hand():
    config = config_with()
    schedule = schedule_of(config, epochs=6)
    expected = parameters()
    moments = dict.fromkeys(expected, (0.0, 0.0))
    for step, (gradients, params) in enumerate(steps(config, schedule, 4)):
        for path, (rate, decay) in FACTORS.items():
            g = gradients[path]
            first = 0.9 * moments[path][0] + 0.1 * g
            second = 0.999 * moments[path][1] + 0.001 * g**2
            moments[path] = first, second
            adam = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-3)
            decays = 0.3 * decay * (g.ndim > 1)
            expected[path] = expected[path] - float(schedule(step)) * rate * (adam + decays * expected[path])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), params, nested(expected))


@pytest.mark.usefixtures("x64")
def test_equals_parameter_groups_of_torch():
    torch = pytest.importorskip("torch")
    config = config_with()
    schedule = schedule_of(config, epochs=6)
    theirs = {path: torch.from_numpy(values).clone() for path, values in parameters().items()}
    groups = [
        {"params": [p], "weight_decay": 0.3 * FACTORS[path][1] * (p.ndim > 1)} for path, p in theirs.items()
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-3)
    params = None
    for step, (gradients, params) in enumerate(steps(config, schedule, 6)):  # noqa: B007
        for group, (path, p) in zip(reference.param_groups, theirs.items(), strict=True):
            group["lr"] = float(schedule(step)) * FACTORS[path][0]
            p.grad = torch.from_numpy(gradients[path])
        reference.step()
    for path, p in theirs.items():
        ours = params
        for name in path.split("/"):
            ours = ours[name]
        np.testing.assert_allclose(ours, p.numpy(), rtol=1e-12, atol=1e-14)


def test_rules_leave_the_structure_of_the_state():
    params = jax.tree.map(jnp.asarray, nested(parameters()))
    plain, ruled = (
        optim.make_optimizer(config_with(rules), schedule_of(config_with(rules))).init(params)
        for rules in ((), RULES)
    )
    assert jax.tree.structure(plain) == jax.tree.structure(ruled)


def test_neutral_rules_change_no_bit():
    config, plain = config_with(((".*", 1.0, 1.0),)), config_with(())
    for (_, a), (_, b) in zip(steps(config, schedule_of(config), 3), steps(plain, schedule_of(plain), 3)):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("head/.*",), r"config.optim.rules[0] is 'head/.*'; expected (regular expression, factor"),
        ((("head/.*", 1.0),), "config.optim.rules[0] is ('head/.*', 1.0); expected (regular"),
        ("head", "config.optim.rules is 'head'; expected a tuple of rules"),
        ((("(", 1.0, 1.0),), "config.optim.rules[0] is ('(', 1.0, 1.0), which is not a regular expression"),
        (((".*", 1.0, -1.0),), "config.optim.rules[0] is ('.*', 1.0, -1.0), with the factor -1.0"),
        (((".*", float("nan"), 1.0),), "with the factor nan; expected a number of at least 0"),
        (((".*", True, 1.0),), "with the factor True; expected a number of at least 0"),
        (
            (("head/.*", 1.0, 1.0), ("haed/kernel", 1.0, 1.0)),
            "config.optim.rules[1] ('haed/kernel') matches no parameter; the nearest are head/kernel",
        ),
        (
            (("block1", 1.0, 1.0),),
            "matches no parameter; it must match a whole path, such as block1/dense/kernel: try '.*block1.*'",
        ),
        (
            ((".*", 1.0, 1.0), ("head/.*", 1.0, 1.0)),
            "config.optim.rules[1] ('head/.*') matches only what earlier rules match",
        ),
    ],
)
def test_wrong_rules_are_named(rules, message):
    config = settings()
    config = type(config)({**config.to_dict(), "rules": rules})
    with pytest.raises(UserError) as error:
        optim.make_optimizer(config, schedule_of(config)).init(nested(parameters()))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
