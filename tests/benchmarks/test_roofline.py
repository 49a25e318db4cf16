"""The ceilings of a machine, the least time of a step, and the picture of both."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ceilings, floor, jax_side, roofline, shares
from benchmarks.workload import Work
from bvit_jax.errors import UserError
from bvit_jax.training.steps.state import create_state

CEILINGS = {
    "device": "cpu",
    "bytes_per_second": {"read": [80.0, 100.0], "update": [50.0, 60.0]},
    "operations_per_second": {
        "float32": [10.0, 8.0],
        "bfloat16": [40.0, 30.0],
        "int8": [20.0, 20.0],
        "binary": [160.0, 150.0],
    },
    "published": None,
}


WORK = Work(binary_macs=800, real_macs=100, elements=50, variable_bytes=400, state_bytes=1200)


@pytest.mark.slow
def test_ceilings_are_positive_and_finite():
    found = ceilings.measure(ceilings.Sizes(elements=4096, side=16, binary=(8, 2, 8)), rounds=2)
    assert json.loads(json.dumps(found)) == found
    assert set(found["bytes_per_second"]) == {"read", "update", "add"}
    assert set(found["operations_per_second"]) == {"float32", "bfloat16", "int8", "binary"}
    for rates in (*found["bytes_per_second"].values(), *found["operations_per_second"].values()):
        assert len(rates) == 2
        assert all(rate > 0 and math.isfinite(rate) for rate in rates)
    assert "binary products" in ceilings.table(found)


def test_ceilings_shrink_with_their_scale():
    full, small = (ceilings.default_sizes("cpu", scale) for scale in (1, 0.25))
    assert full == ceilings.CPU
    assert (small.elements, small.side) == (full.elements // 4, full.side // 2)
    with pytest.raises(UserError, match="the scale of the ceilings is 2; expected a number above 0"):
        ceilings.default_sizes("gpu", 2)


def test_packed_products_are_those_of_signs():
    signs = (
        np.random.default_rng(0).choice([-1, 1], (5, 64)),
        np.random.default_rng(1).choice([-1, 1], (64, 7)),
    )
    x, w = (np.packbits(s > 0, axis=axis, bitorder="little") for axis, s in ((1, signs[0]), (0, signs[1])))
    x = x.view(np.uint32)
    w = np.ascontiguousarray(w.T).view(np.uint32).T
    differing = ceilings.differing_bits(jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_array_equal(64 - 2 * differing, signs[0] @ signs[1])


@pytest.mark.parametrize(
    ("kind", "dtype", "flops", "size", "flops_seconds"),
    [
        # Two images. Binary products at 160 operations a second, real ones at 10 or 40.
        ("forward", "float32", 3600, 400 + 2 * 50 * 4, 3200 / 160 + 400 / 10),
        ("evaluation", "bfloat16", 3600, 400 + 2 * 50 * 2, 3200 / 160 + 400 / 40),
        ("training", "float32", 10800, 2400 + 3 * 2 * 50 * 4, 3200 / 160 + (400 + 7200) / 10),
        ("training", "float16", 10800, 2400 + 3 * 2 * 50 * 2, 3200 / 160 + (400 + 7200) / 40),
    ],
)
def test_the_floor_is_that_of_the_formula(kind, dtype, flops, size, flops_seconds):
    found = floor.floor(WORK, kind, 2, dtype, CEILINGS)
    assert (found.flops, found.bytes) == (flops, size)
    assert found.flops_seconds == pytest.approx(flops_seconds)
    assert found.bytes_seconds == pytest.approx(size / 100)
    assert found.seconds == max(found.flops_seconds, found.bytes_seconds)


def test_counts_the_work_of_a_model():
    """One block of a DeiT: the products of its patches, attention, MLP and head, by hand."""
    settings = {"image_size": 8, "patch_size": 4, "num_classes": 3, "width": 4, "depth": 1, "num_heads": 2}
    model = jax_side.create_model({"name": "deit", "mlp_dim": 6, **settings}, "float32")
    state = jax.eval_shape(
        lambda key: create_state(key, model, jax_side.fixed_optimizer(), 8), jax.random.key(0)
    )
    found = jax_side.work_of(model, state)
    patches, tokens, head_size, heads = 4, 5, 2, 2
    attention = 2 * heads * tokens**2 * head_size
    macs = patches * 48 * 4 + 4 * tokens * 4 * 4 + attention + 2 * tokens * 4 * 6 + 4 * 3
    assert (found.binary_macs, found.real_macs) == (0, macs)
    parameters = jax_side.num_params(state.params)
    assert found.variable_bytes == 4 * parameters
    assert found.state_bytes - found.variable_bytes - 2 * 4 * parameters < 64  # AdamW's counters
    x, scores, hidden = tokens * 4, heads * tokens**2, tokens * 6
    read = patches * 48 + x + (2 * x) + (scores + x) + x + x + hidden + 4  # queries, keys and values share x
    written = patches * 4 + 3 * x + scores + x + x + hidden + x + 3
    assert found.elements == read + written


def report(tmp_path: Path) -> Path:
    side = {"dtype": "float32", "devices": 1, "accessed_bytes": {"training": 5000}}
    speeds = {"forward": [2.0, 3.0], "training": [0.5, 0.6]}
    sides = {name: {**side, "images_per_second": speeds} for name in ("bvit_jax", "reference")}
    sides["reference"]["accessed_bytes"] = {}
    counted = dataclasses.asdict(WORK)
    run = {"batch": 2, "work": counted, "sides": sides}
    shares.add_shares(run, CEILINGS)
    found = {"model": "tiny", "machine": {"cpu": "a CPU", "cores": 2}, "ceilings": CEILINGS, "runs": [run]}
    file = tmp_path / "found.json"
    file.write_text(json.dumps(found))
    return file


def test_shares_are_of_the_ceilings(tmp_path):
    sides = json.loads(report(tmp_path).read_text())["runs"][0]["sides"]
    found = sides["bvit_jax"]["achieved"]["training"]
    seconds = 2 / 0.55
    assert found["share_of_flops"] == pytest.approx(10800 / seconds / 10)
    assert found["share_of_bytes"] == pytest.approx(5000 / seconds / 100)
    assert found["share_of_floor"] == pytest.approx((20 + 760) / seconds)
    assert "accessed_bytes_per_second" not in sides["reference"]["achieved"]["training"]


def test_draws_a_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "roofline.png"
    assert roofline.main([str(report(tmp_path)), "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", [], "error: FILE is {file}: no report"),
        ('{"ceilings": null, "runs": [1]}', [], "error: FILE is {file}: it has no ceilings"),
        ('{"ceilings": {"x": 1}, "runs": [{"batch": 8}]}', ["--batch", "9"], "error: --batch is 9; "),
    ],
)
def test_roofline_says_what_is_wrong(tmp_path, capsys, content, arguments, message):
    file = tmp_path / "found.json"
    file.write_text(content)
    assert roofline.main([str(file), "--png", str(tmp_path / "x.png"), *arguments]) == 1
    assert capsys.readouterr().err.startswith(message.format(file=file))


def test_ceilings_say_what_is_wrong(capsys):
    assert ceilings.main(["--json", "nowhere/x.json"]) == 1
    assert capsys.readouterr().err.startswith("error: --json is nowhere/x.json: its directory does not exist")
