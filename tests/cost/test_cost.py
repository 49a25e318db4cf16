"""What a model costs, against closed forms of its sizes that know nothing of the counter."""

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from bvit_jax import config as config_lib
from bvit_jax import models
from bvit_jax.cost import cost_of
from bvit_jax.cost import count as counting
from bvit_jax.cost import program as tracing
from bvit_jax.cost.speedup import speedups
from bvit_jax.layers.kernels import noted_kernels
from bvit_jax.models.factory import MODELS
from bvit_jax.models.head import ModelOutput
from bvit_jax.report import models as report_models
from bvit_jax.report.__main__ import main
from bvit_jax.report.cost import Subject, as_text, figures, measure, speedup_table, subject_of
from bvit_jax.runtime.arguments import parse_config
from bvit_jax.weights.state_dicts import abstract_variables
from bvit_jax.workdir.checkpoint import FOLDER
from tests.tiny_models import SMALLEST

# ml_collections loads the file of a configuration in a way that importlib calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

REPOSITORY = Path(__file__).parents[2]
PYRAMID = {
    "image_size": 32,
    "num_classes": 10,
    "width": (8, 16),
    "depth": (2, 1),
    "num_heads": (2, 4),
    "mlp_dim": (32, 32),
    "reduction": (2, 1),
}
FLAT = {
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 10,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 32,
}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "num_classes": 10,
    "width": 8,
    "depth": (2, 1),
    "num_heads": (2, 2),
    "window_size": 4,
}
SMALL = {name: WINDOWS if name.endswith("swin") else FLAT for name in MODELS}
SMALL |= {"binaryvit": PYRAMID, "bhvit": SMALLEST["bhvit"]}


def small(name, **settings):
    return models.model_config(name, **{**SMALL[name], **settings})


@functools.cache
def count(name, **settings):
    """Returns the cost of a small model in inference."""
    config = small(name, **settings)
    return cost_of(models.create_model(config), config.image_size, training=False)


# --- closed forms ------------------------------------------------------------------------------


def pyramid_macs(image, patch, classes, width, depth, mlp_dim, reduction, some_fp=False):
    """Returns the binary and the real multiply-accumulates of BinaryViT."""
    side, binary = image // patch, 0
    real = side**2 * patch**2 * 3 * width[0] + width[-1] * classes
    for stage, (c, d, m, r) in enumerate(zip(width, depth, mlp_dim, reduction)):
        if stage:
            side //= 2
            between = side**2 * 4 * width[stage - 1] * c
            real, binary = (real + between, binary) if some_fp else (real, binary + between)
        n, keys = side**2, (side // r) ** 2
        projections = 2 * n * c**2 + (3 if r > 1 else 2) * keys * c**2
        binary += d * (projections + 2 * n * keys * c + 2 * n * c * m)
    return binary, real


def block_macs(n, c, m):
    """Returns the multiply-accumulates of a transformer block with attention over everything."""
    return 4 * n * c**2 + 2 * n**2 * c + 2 * n * c * m


FULL = (224, 4, 1000, (64, 128, 256, 512), (3, 4, 8, 4), (512, 1024, 1024, 2048), (8, 4, 1, 1))


shared_cost_of = functools.cache(cost_of)  # of the same models as in the table of the README
SCANNED = models.Execution(scan_blocks=True)  # costs the same, and is traced once a stage


def full(name, **settings):
    """Returns the cost of a model at full size."""
    config = models.model_config(name, **settings)
    return shared_cost_of(models.create_model(config, execution=SCANNED), config.image_size, training=False)


@pytest.mark.slow
@pytest.mark.parametrize(("some_fp", "ops"), [(False, 0.070), (True, 0.146)])
def test_the_products_of_binaryvit(some_fp, ops):
    cost = full("binaryvit", some_fp=some_fp)
    binary, real = pyramid_macs(*FULL, some_fp)
    assert cost.total.macs == {"binary": binary, "real": real}
    assert cost.total.ops == binary / 64 + real
    assert round(cost.total.ops / 1e9, 3) == ops
    assert not cost.uncounted
    if not some_fp:
        assert (binary, real) == (3_822_206_976, 10_145_792)


@pytest.mark.slow
def test_the_products_of_react_deit():
    settings = {"class_token": True, "pool_branches": (), "layer_scale": False}
    cost = full("react_deit", **settings)
    assert cost.total.macs == {"binary": 12 * block_macs(197, 384, 1536), "real": 196 * 768 * 384 + 384_000}
    assert round(cost.total.ops / 1e9, 3) == 0.129


TINY = {"width": 192, "num_heads": 3, "mlp_dim": 768}


def compared(name, backbone, **settings):
    """Returns the cost of a model, that of its real-valued backbone, and their comparison."""
    config = models.model_config(name, **settings)
    settings_of_real = models.real_backbone(config)
    assert settings_of_real.name == backbone
    real = full(**settings_of_real)
    cost = full(name, **settings)
    return cost, real, {item.convention: item for item in speedups(cost, real)}


def documented(items, backbone):
    """Returns whether a comparison is in the documentation as the command prints it."""
    text = speedup_table([dataclasses.asdict(item) for item in items.values()], backbone)
    return text in (REPOSITORY / "docs" / "cost.md").read_text()


@pytest.mark.slow
def test_the_products_of_bivit_and_its_speedup():
    cost, real, items = compared("bivit_deit", "deit", **TINY)
    blocks, embedding, heads = 12 * block_macs(198, 192, 768), 196 * 768 * 192, 2 * 192_000
    assert cost.total.macs == {"binary": blocks, "real": embedding + heads}
    assert real.total.macs == {"real": blocks + embedding + heads}
    everything, no_embedding, no_heads, neither = items.values()
    assert everything.ratio == (blocks + embedding + heads) / (blocks / 64 + embedding + heads)
    assert everything.ratio == pytest.approx(26, abs=0.05)
    assert neither.ratio == 64
    assert no_heads.macs == blocks + embedding
    assert no_embedding.rounded_ratio == neither.rounded_ratio == 61.5  # the published one
    # No exact quotient is it, whatever is left out.
    assert all(abs(item.ratio - 61.5) > 1 for item in items.values())
    assert documented(items, "deit")


@pytest.mark.slow
def test_the_published_speedup_of_bivit_swin():
    cost, real, items = compared("bivit_swin", "swin")
    assert real.total.macs["real"] == sum(cost.total.macs.values()) == 4_490_566_656
    assert round(items["without the heads"].rounded_ratio, 1) == 56.1
    assert all(abs(item.ratio - 56.1) > 1 for item in items.values())
    assert documented(items, "swin")


def test_the_packed_size_of_binaryvit():
    total = full("binaryvit", some_fp=False).total
    width, depth, mlp = FULL[3], FULL[4], FULL[5]
    reduced = (3, 4, 0, 0)  # blocks with a product that reduces keys and values
    signs = sum(d * (4 * c**2 + 2 * c * m) + n * c**2 for c, d, m, n in zip(width, depth, mlp, reduced))
    signs += sum(4 * a * b for a, b in itertools.pairwise(width))
    scales = sum(d * (5 * c + m) + n * c for c, d, m, n in zip(width, depth, mlp, reduced)) + sum(width[1:])
    assert total.binary_params == signs
    assert total.scales == scales
    assert total.packed_bytes == signs // 8 + 4 * scales + 4 * (22_491_771 - signs)
    head = 512 * 1000 + 1000
    assert (signs // 8 + 4 * head) / 1e6 == pytest.approx(4.7, abs=0.005)  # without what is per channel
    assert total.float_bytes == 4 * 22_491_771


# --- every model -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_every_model(name):
    config = small(name)
    model = models.create_model(config)
    cost = cost_of(model, config.image_size, training=False)
    with noted_kernels() as kernels:
        variables = abstract_variables(model, config.image_size)
    assert cost.total.params == models.num_params(variables["params"])
    assert cost.total.float_bytes == 4 * cost.total.params
    assert cost.total.statistics == models.num_params(variables.get("batch_stats", {}))
    sizes = {path: _subtree(variables["params"], path)["kernel"].size for path in kernels}
    if name == "bivit_release_swin":  # this layer of patch merging has no rule
        sizes["downsample1", "reduction"] = 4 * 8 * 16
    binary = {tuple(x.path.split("/")): x.binary_params for x in cost.layers if x.binary_params}
    assert binary == sizes
    assert not cost.uncounted, f"jax {jax.__version__} has operations that bvit_jax.cost does not know"


def _subtree(tree, path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.slow
def test_real_activations_leave_binary_weights_and_no_binary_product():
    cost = count("binaryvit", act_bits=32)
    binary, real = pyramid_macs(32, 4, 10, *(PYRAMID[k] for k in ("width", "depth", "mlp_dim", "reduction")))
    attention = 2 * 2 * 64 * 16 * 8 + 2 * 16 * 16 * 16
    assert cost.total.macs == {"binary_weight": binary - attention, "real": real + attention}
    assert cost.total.binary_params == count("binaryvit").total.binary_params
    assert cost.total.ops == binary + real


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_of_several_bits(bits):
    one, several = count("react_deit").total, count("react_deit", weight_bits=bits).total
    assert several.low_bit_params == one.binary_params
    assert not several.binary_params
    tensors = 2 * 6
    real = 32 * one.real_params
    assert several.packed_bits == bits * several.low_bit_params + 32 * tensors + real
    assert several.macs["binary_input"] == 2 * (4 * 16 * 16**2 + 2 * 16 * 16 * 32)
    assert several.macs["binary"] == 2 * 2 * 16**2 * 16  # attention


def test_weights_of_32_bits_are_real():
    total = count("react_deit", weight_bits=32).total
    assert total.real_params == total.params


@pytest.mark.parametrize(
    "settings", [{"norm": "layer_norm"}, {"class_token": True, "pool_branches": ()}, {"batch_norm_group": 2}]
)
def test_other_variants_have_the_same_kinds_of_products(settings):
    cost = count("react_deit", **settings)
    assert set(cost.total.macs) == {"binary", "real"}
    assert not cost.uncounted


def test_products_belong_to_their_layers():
    layers = {layer.path: layer for layer in count("react_deit").layers}
    assert layers["block0/attention/query/dense"].macs == {"binary": 16 * 16**2}
    assert layers["block0/attention"].macs == {"binary": 2 * 16**2 * 16}
    assert layers["block0/attention"].kind == "BinaryAttention"
    assert layers["head"].macs == {"real": 160}
    assert layers["block0/attention/query/rprelu"].elementwise == 5 * 16 * 16  # - > · select +
    assert layers["block0/attention_scale"].elementwise_by == {"affine before a shortcut": 2 * 16 * 16}
    assert layers["block0/attention/query/norm"].elementwise_by == {"normalisation": 2 * 16 * 16}
    # The mean of all tokens: a sum and a division.
    assert layers[""].elementwise_by == {"pooling": 16 * 16 + 16}


@pytest.mark.parametrize("name", ["deit", "swin", "bivit_deit", "bivit_swin"])
def test_element_wise_operations_of_transformers(name):
    kinds = count(name).total.elementwise_by
    assert kinds["activation"] > 0
    assert kinds["softmax"] > 0
    assert kinds["normalisation"] > 0


def test_scanned_blocks_cost_the_same():
    config = small("react_deit")
    model = models.create_model(config, execution=models.Execution(scan_blocks=True))
    scanned = cost_of(model, config.image_size, training=False)
    looped = count("react_deit")
    assert scanned.total.macs == looped.total.macs
    assert scanned.total.elementwise == looped.total.elementwise
    assert scanned.total.binary_params == looped.total.binary_params
    assert not scanned.uncounted


def test_groups_keep_the_sum():
    cost = count("react_deit")
    groups = cost.grouped(1)
    assert [group.path for group in groups if group.kind == "BinaryBlock"] == ["block0", "block1"]
    assert sum(group.params for group in groups) == cost.total.params
    assert sum(group.ops for group in groups) == cost.total.ops
    assert cost.grouped(0) == cost.layers


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_operation_of_a_training_step_is_known(name):
    config = small(name)
    model = models.create_model(config)
    variables = abstract_variables(model, config.image_size)
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)

    def loss(params, state, images):
        output, _ = model.apply({"params": params, **state}, images, train=True, mutable=list(state))
        return jnp.sum(output.logits)

    program = tracing.trace(jax.grad(loss), variables.pop("params"), variables, images)
    # Of a gather, and of the largest in a window; costs are counted of the forward pass alone.
    gradients = {"scatter-add", "select_and_scatter_add"}
    unknown = {operation.name for operation in program.operations} - counting.KNOWN - gradients
    assert not unknown, f"jax {jax.__version__} has operations that bvit_jax.cost does not know"


def test_a_version_of_jax_without_name_stacks_is_named():
    with pytest.raises(RuntimeError, match=rf"named scopes of jax {re.escape(jax.__version__)}"):
        tracing._scopes(SimpleNamespace(source_info=None))


# --- memory ------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two layers whose residuals are known."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(8, use_bias=False, name="first")(images.reshape(1, -1))
        x = jnp.sin(x)
        x = nn.Dense(4, use_bias=False, name="second")(x)
        return ModelOutput(x, (x,))


def test_memory_of_a_chain():
    cost = cost_of(Chain(), 2)
    # The backward pass needs cos of the first product and the sin that enters the second.
    assert cost.total.saved_bytes == 4 * (8 + 8)
    assert cost.inference_bytes == 4 * (12 + 8)  # image and first product
    first = {layer.path: layer for layer in cost.layers}["first"]
    assert first.moved_bytes == first.packed_moved_bytes == 4 * (12 + 12 * 8 + 8)
    assert first.macs_per_byte == 96 / (4 * 116)


@pytest.mark.slow
def test_rematerialisation_keeps_less():
    config = small("react_deit")
    plain = models.create_model(config)

    def create_with(remat):
        return models.create_model(config, execution=models.Execution(remat))

    kept = [
        cost_of(plain, 16, trained=create_with(remat)).total.saved_bytes
        for remat in ("none", "dots", "products", "block")
    ]
    assert kept[0] > kept[1] > kept[2] > kept[3] > 0


@pytest.mark.slow
def test_activations_in_half_precision_take_less():
    config = small("binaryvit")
    full, half = (measure(Subject(config, dtype)).total.saved_bytes for dtype in ("float32", "bfloat16"))
    assert half < full


# --- a user's own model ------------------------------------------------------------------------


class Strange(nn.Module):
    """Layers that count, and some that cannot be counted."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(8, use_bias=False, name="dense")(images.reshape(1, -1))
        x = Rounds(name="rounds")(x)
        x = Until(name="until")(x)
        x = Spectrum(name="spectrum")(x)
        x = Chooses(name="chooses")(x)
        self.param("forgotten", nn.initializers.zeros, (3,))
        return ModelOutput(x, (x,))


class Rounds(nn.Module):
    """Five rounds of one product: a scan."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (8, 8))
        return lax.scan(lambda carry, _: (jnp.tanh(carry @ kernel), None), x, None, length=5)[0]


class Until(nn.Module):
    """Products until a condition holds."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (8, 8))
        return lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: y @ kernel, x)


class Spectrum(nn.Module):
    """A primitive that is not known here."""

    def __call__(self, x):
        return jnp.cumsum(jnp.fft.rfft(x).real, axis=-1)


class Chooses(nn.Module):
    """A product only if."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (5, 5))
        return lax.cond(jnp.sum(x) > 0, lambda y: y @ kernel, lambda y: y, x)


def test_what_is_not_counted_is_listed():
    cost = cost_of(Strange(), 2, training=False)
    layers = {layer.path: layer for layer in cost.layers}
    assert layers["rounds"].macs == {"real": 5 * 64}
    assert layers["rounds"].elementwise == 5 * 8
    assert cost.total.macs == {"real": 96 + 320}
    assert cost.total.params == 96 + 64 + 64 + 25 + 3
    listed = {(item.path, item.what): item.elements for item in cost.uncounted}
    assert listed == {
        ("until", "while"): 8,
        ("spectrum", "fft"): 5,
        ("spectrum", "cumsum"): 5,
        ("chooses", "cond"): 5,
        ("", "parameter forgotten, used by nothing"): 3,
    }


class Recurrent(nn.Module):
    """A scan whose state begins with zeros: its products depend on the images all the same."""

    @nn.compact
    def __call__(self, images, train=False):
        kernel = self.param("kernel", nn.initializers.ones, (6, 6))

        def step(state, row):
            signs = jnp.where(kernel > 0, 1.0, -1.0)
            return jnp.sign(state) @ signs + row, None

        state = lax.scan(step, jnp.zeros((1, 6)), images.reshape(2, 1, 6))[0]
        return ModelOutput(state, (state,))


def test_a_scan_whose_state_is_constant_at_first():
    total = cost_of(Recurrent(), 2, training=False).total
    assert total.macs == {"binary": 2 * 36}
    assert total.binary_params == 36


def test_what_a_scan_keeps_is_that_of_all_rounds():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = nn.Dense(8, use_bias=False, name="dense")(images.reshape(1, -1))
            x = Rounds(name="rounds")(x)
            return ModelOutput(x, (x,))

    saved = {layer.path: layer.saved_bytes for layer in cost_of(Model(), 2).layers}
    assert saved["rounds"] >= 4 * 5 * (8 + 8)  # the inputs of the products, and what the tanh keeps


class Offsets(nn.Module):
    """Codes with a learned whole offset are one bit, what is made of several of them is not."""

    @nn.compact
    def __call__(self, images, train=False):
        zero_point = jnp.round(self.param("zero_point", nn.initializers.ones, (12,)))
        x = jnp.sign(images.reshape(1, -1)) - zero_point
        signs = jnp.sign(self.param("kernel", nn.initializers.ones, (12, 4)))
        y = x @ signs + (x * x) @ signs + (x + jnp.sign(images.reshape(1, -1))) @ signs
        return ModelOutput(y, (y,))


def test_codes_with_an_offset():
    assert cost_of(Offsets(), 2, training=False).total.macs == {"binary": 48, "binary_weight": 96}


def test_pooling_of_a_user():
    class Pool(nn.Module):
        def __call__(self, images, train=False):
            x = nn.avg_pool(images, (2, 2), strides=(2, 2)).reshape(1, -1)
            return ModelOutput(x, (x,))

    cost = cost_of(Pool(), 4, training=False)
    assert not cost.uncounted
    assert cost.total.elementwise == 12 * 4 + 12  # sums and divisions


class Signs(nn.Module):
    """A user's own binary layers: what is binary follows from what is computed."""

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(1, -1)
        kernel = self.param("kernel", nn.initializers.ones, (12, 8))
        x = jnp.sign(x) @ jnp.where(kernel >= 0, 1.0, -1.0) * jnp.mean(jnp.abs(kernel), axis=0)
        both = self.param("both", nn.initializers.ones, (8, 8))  # as signs and as they are
        x = jnp.sign(x) @ jnp.sign(both) + x @ both
        scaled = self.param("scaled", nn.initializers.ones, (8, 8))  # a scale in the sum is no bit
        x = jnp.sign(x) @ (jnp.sign(scaled) * jnp.abs(scaled))
        return ModelOutput(x, (x,))


def test_binary_layers_of_a_user():
    total = cost_of(Signs(), 2, training=False).total
    assert total.macs == {"binary": 96 + 64, "real": 64, "binary_input": 64}
    assert total.binary_params == 96
    assert total.scales == 8
    assert total.packed_bits == 96 + 8 * 32 + 128 * 32


# --- the command -------------------------------------------------------------------------------

DIGITS = f"--config={REPOSITORY / 'configs' / 'digits.py'}"


@pytest.mark.slow
def test_the_command_prints_json(capsys):
    assert (
        main(["cost", DIGITS, "--config.model.depth=(1, 1)", "--config.compute_dtype=bfloat16", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["compute_dtype"] == "bfloat16"
    names = {layer["path"].split("/")[0] for layer in report["layers"]}
    assert {"block0", "block1"} <= names
    assert "block2" not in names
    total = report["total"]
    assert total["ops"] == total["macs"]["binary"] / 64 + total["macs"]["real"]
    assert sum(sum(kind.values()) for kind in report["packed_bytes_by_kind"].values()) == pytest.approx(
        total["packed_bytes"], abs=10
    )
    assert report["uncounted"] == []


@pytest.mark.slow
def test_the_command_prints_text(capsys):
    assert main(["cost", DIGITS, "--depth=1", "--config.model.depth=(1, 1)"]) == 0
    text = capsys.readouterr().out
    assert "uncounted: nothing" in text
    assert "OPs: binary / 64 + all others" in text
    assert text.index("parameters\n") < text.index("uncounted") < text.index("block0")
    assert "MACs/byte" in text


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120, 400])
def test_the_text_fits_the_terminal(columns):
    config = parse_config([DIGITS, "--config.model.depth=(1, 1)"])
    text = as_text(figures(subject_of(config)), columns)
    assert max(map(len, text.splitlines())) <= columns
    assert ("left out, as the terminal is too narrow: float32 kB" in text) == (columns < 400)
    assert "binary MACs" in text


@pytest.mark.slow
def test_the_command_reads_a_checkpoint(capsys):
    teacher = REPOSITORY / "bvit_jax" / "assets" / "deit_digits"
    assert main(["cost", f"--checkpoint={teacher}", "--json", "--depth=1"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["params"] == 208_970


@pytest.mark.slow
def test_the_command_reads_the_configuration_of_a_run(tmp_path, capsys):
    config = parse_config([DIGITS, "--config.remat=block"])
    config_lib.save(config, tmp_path / "config.json")
    (tmp_path / FOLDER).mkdir()
    assert main(["cost", f"--checkpoint={tmp_path}", "--json", "--depth=1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["total"]["params"] == 309_900
    assert report["remat"] == "block"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DIGITS, "--config.model.widht=3"], "unknown key"),
        (["--config=nowhere.py"], "cannot load nowhere.py"),
        ([], "--config is missing"),
        ([DIGITS, "--checkpoint=here"], "leave out --config"),
        (["--checkpoint=nowhere"], "nowhere"),
        ([DIGITS, "--depth=-1"], "--depth is -1"),
        ([DIGITS, "extra"], "unexpected argument 'extra'"),
        ([DIGITS, "--config.model.reduction=(3, 1)"], "config.model.reduction[0] is 3"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["cost", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_other_reports_take_no_configuration(capsys):
    assert main(["table", "--config=x"]) == 2
    assert "--config=x" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_the_readme(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(report_models, "cost_of", shared_cost_of)
    assert main(["table"]) == 0
    assert capsys.readouterr().out in Path("README.md").read_text()
