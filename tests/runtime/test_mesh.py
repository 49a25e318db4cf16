"""Where arrays live: the rules, and what a device holds."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bvit_jax.errors import UserError
from bvit_jax.models import model_config
from bvit_jax.runtime.mesh import local_rows, make_mesh, replicate, shard_batch, state_sharding
from bvit_jax.training.setup import build
from tests.configs import tiny


def test_rules():
    shapes = {
        "params": {"block0": {"kernel": np.zeros((6, 16)), "square": np.zeros((8, 8)), "odd": np.zeros(7)}},
        "opt_state": ({"mu": {"block0": {"kernel": np.zeros((6, 16))}}, "count": np.int32(0)},),
        "batch_stats": {"norm": {"mean": np.zeros(16)}},
        "ema": {"params": {"x": np.zeros(16)}, "batch_stats": {"x": np.zeros(16)}},
        "signs": {"kernel": np.zeros(16, np.uint8)},
        "step": np.int32(0),
    }
    specs = jax.tree.map(lambda s: s.spec, state_sharding(shapes, make_mesh(fsdp=4)))
    assert specs == {
        "params": {"block0": {"kernel": P(None, "fsdp"), "square": P("fsdp"), "odd": P()}},
        "opt_state": ({"mu": {"block0": {"kernel": P(None, "fsdp")}}, "count": P()},),
        "batch_stats": {"norm": {"mean": P()}},
        "ema": {"params": {"x": P("fsdp")}, "batch_stats": {"x": P()}},
        "signs": {"kernel": P()},
        "step": P(),
    }
    whole = jax.tree.leaves(state_sharding(shapes, make_mesh()))
    assert all(sharding.spec == P() for sharding in whole)


def test_devices_must_divide():
    with pytest.raises(UserError, match=r"config.mesh.fsdp is 3; expected a divisor of the 8 devices"):
        make_mesh(fsdp=3)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_rows_of_one_process_are_all(fsdp):
    mesh = make_mesh(fsdp=fsdp)
    np.testing.assert_array_equal(local_rows(mesh, 24), np.arange(24))
    images = np.arange(24)
    sharded = shard_batch({"image": images}, mesh)["image"]
    np.testing.assert_array_equal(sharded, images)
    assert {shard.data.shape for shard in sharded.addressable_shards} == {(3,)}


def test_replicate_puts_the_whole_on_every_device():
    tree = replicate({"a": np.arange(5), "b": np.float32(2)}, make_mesh(fsdp=2))
    assert {len(leaf.addressable_shards) for leaf in jax.tree.leaves(tree)} == {8}
    assert all(shard.data.shape == (5,) for shard in tree["a"].addressable_shards)


def small_config(fsdp):
    config = tiny.get_config()
    shape = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64}
    config.model = model_config("react_deit", num_classes=10, **shape)
    config.mesh.fsdp = fsdp
    return config


def held(tree):
    """Returns the bytes that the first device holds of a tree."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_fsdp_holds_a_sixth_and_computes_the_same():
    losses, bytes_held = {}, {}
    generator = np.random.default_rng(0)
    batches = [
        {
            "image": generator.integers(0, 256, (144, 16, 16, 3), np.uint8),
            "label": generator.integers(0, 10, 144, np.int32),
        }
        for _ in range(4)
    ]
    for fsdp in (1, 8):
        run = build(small_config(fsdp), 1437)
        state = run.programs.create.run(jax.random.key(0), {})
        for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(run.state), strict=True):
            assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
        bytes_held[fsdp] = held((state.params, state.opt_state))
        losses[fsdp] = []
        for batch in batches:
            state, metrics = run.programs.train.run(
                state, shard_batch(batch, run.mesh), {}, jax.random.key(1)
            )
            losses[fsdp].append(float(metrics["loss"]))
        assert held((state.params, state.opt_state)) == bytes_held[fsdp]
        whole = run.programs.gather.run(state.variables)
        assert held(whole) == sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    assert bytes_held[8] <= bytes_held[1] / 6
    np.testing.assert_allclose(losses[8], losses[1], rtol=1e-5)
    assert losses[1][-1] != losses[1][0]


def test_the_state_is_never_whole_on_a_device():
    run = build(small_config(8), 1437)
    memory = run.programs.create.function.lower(jax.random.key(0), {}).compile().memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.state))
    assert memory.output_size_in_bytes < whole / 4
    assert memory.temp_size_in_bytes < whole / 4
