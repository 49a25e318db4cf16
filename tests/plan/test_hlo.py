from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bvit_jax.layers import closed_form
from bvit_jax.plan import hlo
from bvit_jax.plan.hlo import Collective
from bvit_jax.runtime.mesh import batch_sharded, make_mesh, replicated

MERGED = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

ENTRY %main.7 (p0: f32[8,4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = (f32[8,4]{1,0:T(8,128)S(1)}, f32[], /*index=2*/bf16[6]{0}) all-reduce(%p0, %b, %c), \
channel_id=7, replica_groups=[1,8]<=[8], to_apply=%add, metadata={op_name="jit(f)/transpose(jvp(M))/dot"}
  %get-tuple-element.3 = f32[8,4]{1,0} get-tuple-element(%all-reduce.1), index=0, \
metadata={op_name="jit(f)/transpose(jvp(M))/norm/batch_norm/reduce_sum"}
  ROOT %get-tuple-element.4 = f32[] get-tuple-element(%all-reduce.1), index=1, \
metadata={op_name="jit(f)/mean"}
}
"""


def test_arrays_that_the_compiler_merged_are_told_apart() -> None:
    (found,) = hlo.collectives_of(MERGED)
    assert (found.kind, found.sizes, found.times) == ("all-reduce", (128, 4, 12), 1)
    assert found.purposes == ("batch_norm_backward", "other", "gradient")
    traffic = hlo.by_purpose([found])
    assert {name: (t.count, t.bytes) for name, t in traffic.items()} == {
        "gradient": (0, 12),
        "batch_norm_forward": (0, 0),
        "batch_norm_backward": (1, 128),
        "other": (0, 4),
    }


ASYNCHRONOUS = """\
%wrapped (p: f32[16]) -> f32[64] {
  %p = f32[16]{0} parameter(0)
  ROOT %all-gather.9 = f32[64]{0} all-gather(%p), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: f32[16]) -> f32[64] {
  %x = f32[16]{0} parameter(0)
  %all-reduce-start.1 = f32[16]{0} all-reduce-start(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %all-reduce-done.1 = f32[16]{0} all-reduce-done(%all-reduce-start.1)
  %all-gather-start.1 = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), channel_id=2, replica_groups={{0,1}}
  %all-gather-done.1 = f32[64]{0} all-gather-done(%all-gather-start.1)
  %collective-permute-start.1 = (u8[32]{0}, u8[32]{0}, u32[], u32[]) collective-permute-start(%y), \
channel_id=3, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done.1 = u8[32]{0} collective-permute-done(%collective-permute-start.1)
  %async.1 = ((f32[16]{0}), f32[64]{0}, s32[]) async-start(%x), calls=%wrapped
  %async.2 = ((f32[16]{0}), f32[64]{0}, s32[]) async-update(%async.1), calls=%wrapped
  ROOT %async.3 = f32[64]{0} async-done(%async.2), calls=%wrapped
}
"""


def test_start_and_done_are_one() -> None:
    traffic = hlo.by_kind(hlo.collectives_of(ASYNCHRONOUS))
    assert {kind: (t.count, t.bytes) for kind, t in traffic.items()} == {
        "all-reduce": (1, 64),
        "all-gather": (2, 512),
        "collective-permute": (1, 32),
    }


UNKNOWN = """\
ENTRY %main (x: f32[16]) -> f32[64] {
  %all-reduce.1 = f32[16]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %all-reduce.2 = f32[16]{0} << all-reduce of another form, replica_groups={{0,1}}, to_apply=%add
  ROOT %ragged = f32[64]{0} ragged-all-to-all(%x), channel_id=2, replica_groups={{0,1}}
}
"""


def test_what_is_not_understood_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert len(hlo.collectives_of(MERGED) + hlo.collectives_of(ASYNCHRONOUS)) == 5
    assert caplog.text == ""
    assert len(hlo.collectives_of(UNKNOWN)) == 1
    assert "2 of 3 operations between devices are not understood" in caplog.text
    assert "%all-reduce.2 = f32[16]" in caplog.text


LOOP = """\
%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-to-all.1 = f32[4]{0} all-to-all(%v), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %fusion.2 = f32[2]{0} fusion(%all-to-all.1), kind=kCustom, calls=%all-reduce-scatter.5
  ROOT %tuple.1 = (s32[], f32[4]{0}) tuple(%i, %all-to-all.1)
}

%all-reduce-scatter.5 (p: f32[4]) -> f32[2] {
  %p = f32[4]{0} parameter(0)
  %all-reduce.8 = f32[4]{0} all-reduce(%p), channel_id=3, replica_groups={{0,1}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[2]{0} dynamic-slice(%all-reduce.8, %o), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  ROOT %while.1 = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0","step":"1"}}
}
"""


def test_a_loop_counts_every_trip_and_a_fused_reduce_scatter_is_one() -> None:
    traffic = hlo.by_kind(hlo.collectives_of(LOOP))
    assert {kind: (t.count, t.bytes) for kind, t in traffic.items()} == {
        "all-to-all": (12, 192),
        "reduce-scatter": (12, 192),
    }


MEMORY = """\
%fused (p: f32[100]) -> f32[100] {
  ROOT %big = f32[100]{0} add(%p, %p)
}

ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0:T(128)} parameter(0)
  %near = f32[100]{0:T(128)S(1)} fusion(%x), kind=kLoop, calls=%fused
  %copy-start.1 = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done.1 = f32[100]{0:T(128)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[100]{0:T(128)}), f32[10]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:10]}
  ROOT %out = f32[100]{0:T(128)} add(%near, %copy-done.1)
}
"""


def test_bytes_on_the_die_do_not_count() -> None:
    # x into the fusion, x into the copy, a tenth of x, and the result.
    assert hlo.hbm_bytes(MEMORY) == 400 + 400 + 40 + 400


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("f32[]", (4,)),
        ("pred[3,5]{1,0}", (15,)),
        ("(bf16[2,3]{1,0:T(8,128)(2,1)}, s4[8], /*index=2*/f8e4m3fn[7], token[])", (12, 4, 7, 0)),
    ],
)
def test_bytes_of_a_shape(shape: str, sizes: tuple[int, ...]) -> None:
    assert hlo.shape_bytes(shape) == sizes


def test_purposes() -> None:
    assert hlo.purpose_of("jit(train_step)/jvp(BinaryViT)/norm/batch_norm/reduce_sum") == "batch_norm_forward"
    assert hlo.purpose_of("jit(s)/transpose(jvp(B))/norm/batch_norm/reduce_sum") == "batch_norm_backward"
    assert hlo.purpose_of("jit(s)/transpose(jvp(B))/block0/dense/dot_general") == "gradient"
    assert hlo.purpose_of("jit(s)/jvp()/reduce_sum") == "other"
    assert hlo.purpose_of("") == "other"


def test_an_operation_that_serves_two_purposes_counts_for_the_larger() -> None:
    both = Collective("all-reduce", (8, 24), ("f/mean", "f/transpose(jvp())/dot"), times=3)
    traffic = hlo.by_purpose([both])
    assert (traffic["gradient"].count, traffic["gradient"].bytes) == (3, 72)
    assert (traffic["other"].count, traffic["other"].bytes) == (0, 24)


# --- programs compiled for eight devices -------------------------------------------------------


def compiled_text(function: object, *arguments: tuple, in_specs: tuple, out_spec: PartitionSpec) -> str:
    mesh = make_mesh()
    shardings = [jax.sharding.NamedSharding(mesh, spec) for spec in in_specs]
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for shape, sharding in zip(arguments, shardings, strict=True)
    ]
    out = jax.sharding.NamedSharding(mesh, out_spec)
    return jax.jit(function, out_shardings=out).lower(*shapes).compile().as_text()


@pytest.mark.parametrize(
    ("out_spec", "kind", "size"),
    [
        (PartitionSpec(), "all-reduce", 16 * 24 * 4),
        (PartitionSpec("data"), None, 16 * 24 * 4),  # reduce-scatter, or an all-reduce and a slice
    ],
)
def test_a_product_over_the_sharded_axis_is_one_reduction(
    out_spec: PartitionSpec, kind: str | None, size: int
) -> None:
    sharded = PartitionSpec("data")
    text = compiled_text(
        lambda a, b: a.T @ b, (64, 16), (64, 24), in_specs=(sharded, sharded), out_spec=out_spec
    )
    (found,) = hlo.collectives_of(text)
    assert found.kind in ((kind,) if kind else ("all-reduce", "reduce-scatter"))
    assert sum(found.sizes) == size // (8 if found.kind == "reduce-scatter" else 1)


def test_gathering_a_sharded_array_is_an_all_gather() -> None:
    text = compiled_text(
        lambda a: a * 2, (64, 4), in_specs=(PartitionSpec("data"),), out_spec=PartitionSpec()
    )
    (found,) = hlo.collectives_of(text)
    assert (found.kind, found.sizes) == ("all-gather", (64 * 4 * 4,))


def test_a_loop_on_devices_counts_its_trips() -> None:
    def function(a: jax.Array) -> jax.Array:
        return jax.lax.scan(
            lambda carry, _: (carry * jnp.sum(a * carry), None), jnp.ones(()), None, length=7
        )[0]

    text = compiled_text(function, (64,), in_specs=(PartitionSpec("data"),), out_spec=PartitionSpec())
    traffic = hlo.by_kind(hlo.collectives_of(text))
    assert (traffic["all-reduce"].count, traffic["all-reduce"].bytes) == (7, 28)


def test_batch_norm_is_known_by_its_scope_forward_and_backward() -> None:
    mesh = make_mesh()

    def loss(weights: dict, x: jax.Array) -> jax.Array:
        y, _, _ = closed_form.batch_norm(x @ weights["kernel"], weights["scale"], weights["bias"], 1e-5)
        return jnp.mean(jnp.square(y) * jnp.arange(4.0))

    shape = partial(jax.ShapeDtypeStruct, dtype=np.float32, sharding=replicated(mesh))
    weights = {"kernel": shape((6, 4)), "scale": shape((4,)), "bias": shape((4,))}
    x = jax.ShapeDtypeStruct((64, 6), jnp.float32, sharding=batch_sharded(mesh))
    step = jax.jit(jax.grad(loss), out_shardings=replicated(mesh))
    traffic = hlo.by_purpose(hlo.collectives_of(step.lower(weights, x).compile().as_text()))
    assert traffic["batch_norm_forward"].bytes == 2 * 4 * 4  # mean and variance
    assert traffic["batch_norm_forward"].count == 2
    assert traffic["batch_norm_backward"].bytes == 2 * 4 * 4  # gradients of scale and bias
    assert traffic["gradient"].bytes == 6 * 4 * 4
