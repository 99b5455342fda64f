"""Collectives of compiled programs and of HLO text by hand, to the byte."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ultramem_jax.parallel.collectives import Collective, collectives_of, summary

AXES = ("data", "fsdp", "tensor", "memory", "width")
PART = 4 * 8 * 4
"""Bytes of the (4, 8) float32 that every device has."""


def _mesh(*shape):
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 5)


@pytest.fixture(scope="module")
def mesh():
    return _mesh(2, 1, 1, 4, 1)


def _compiled(f, mesh, *xs):
    """Compiles `f`, given whole arrays on every device, and returns the text of the program."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped).lower(*xs).compile().as_text()


def _of(f, mesh, *xs):
    return collectives_of(_compiled(f, mesh, *(xs or (jnp.ones((4, 8)),))), mesh)


def _only(collectives) -> Collective:
    assert len(collectives) == 1
    return collectives[0]


def _bytes(collective):
    return collective.operand_bytes, collective.result_bytes, collective.moved_bytes


@pytest.mark.parametrize(
    "axes, in_order, size",
    [
        ("data", ("data",), 2),
        ("memory", ("memory",), 4),
        (("data", "memory"), ("data", "memory"), 8),
        (("memory", "data"), ("data", "memory"), 8),
        (("fsdp", "memory", "width"), ("memory",), 4),
    ],
)
class TestKindsAndAxes:
    def _check(self, f, mesh, kind, expected, in_order, size):
        found = _only(_of(f, mesh))
        assert (found.kind, found.axes, found.group_size, _bytes(found)) == (kind, in_order, size, expected)
        assert (found.loop_trip_count, found.in_loop, found.trips_known) == (1, False, True)

    def test_all_gather(self, mesh, axes, in_order, size):
        expected = PART, size * PART, (size - 1) * PART
        self._check(lambda x: lax.all_gather(x, axes), mesh, "all-gather", expected, in_order, size)

    def test_all_reduce(self, mesh, axes, in_order, size):
        expected = PART, PART, 2 * PART * (size - 1) // size
        self._check(lambda x: lax.psum(x, axes), mesh, "all-reduce", expected, in_order, size)

    def test_reduce_scatter(self, mesh, axes, in_order, size):
        def scatter(x):
            return lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True)

        expected = PART, PART // size, PART * (size - 1) // size
        self._check(scatter, mesh, "reduce-scatter", expected, in_order, size)

    def test_all_to_all(self, mesh, axes, in_order, size):
        def exchange(x):
            return lax.all_to_all(x, axes, split_axis=1, concat_axis=0, tiled=True)

        self._check(exchange, mesh, "all-to-all", (PART, PART, PART * (size - 1) // size), in_order, size)

    def test_permute(self, mesh, axes, in_order, size):
        if jax.__version_info__ >= (0, 11) and isinstance(axes, tuple):
            axes = tuple(sorted(axes, key=AXES.index))  # it takes no other order

        def shift(x):
            return lax.ppermute(x, axes, [(i, (i + 1) % size) for i in range(size)])

        self._check(shift, mesh, "collective-permute", (PART, PART, PART), in_order, size)


@pytest.mark.parametrize(
    "axes", [("data", "tensor"), ("fsdp", "memory"), ("fsdp",), ("data", "fsdp", "memory")]
)
def test_subsets_of_axes_in_a_mesh_of_several(axes):
    mesh = _mesh(2, 2, 1, 2, 1)
    found = _only(_of(lambda x: lax.psum(x, axes), mesh))
    assert found.axes == tuple(axis for axis in axes if axis != "tensor")


def test_psum_of_a_tree(mesh):
    def total(x):
        return lax.psum({"a": x, "b": x[0].astype(jnp.int32), "c": x[:2] > 0}, "memory")

    found = _of(total, mesh)
    assert summary(found) == {("all-reduce", ("memory",)): 2 * (PART + 8 * 4 + 16 * 4) * 3 // 4}
    assert all("psum" in collective.op_name for collective in found)


def test_axes_of_size_one_move_nothing(mesh):
    text = _compiled(lambda x: lax.psum(x, ("fsdp", "width")), mesh, jnp.ones((4, 8)))
    assert collectives_of(text, mesh) == []


def test_without_a_mesh_axes_have_no_names(mesh):
    text = _compiled(lambda x: lax.psum(x, "memory"), mesh, jnp.ones((4, 8)))
    found = _only(collectives_of(text, None))
    assert (found.axes, found.group_size) == ((), 4)


def test_groups_that_no_axes_have(mesh):
    found = _only(_of(lambda x: lax.psum(x, "memory", axis_index_groups=[[0, 1], [2, 3]]), mesh))
    assert (found.axes, found.group_size) == ((), 2)


def test_a_permutation_within_and_one_across_axes(mesh):
    swap = _only(_of(lambda x: lax.ppermute(x, "memory", [(0, 1), (1, 0)]), mesh))
    assert (swap.axes, swap.group_size, swap.moved_bytes) == (("memory",), 2, PART)
    both = _only(_of(lambda x: lax.ppermute(x, ("data", "memory"), [(0, 7), (1, 1)]), mesh))
    assert (both.axes, both.group_size, both.moved_bytes) == (("data", "memory"), 2, PART)


def test_devices_of_a_mesh_in_another_order():
    devices = np.array(jax.devices())[[3, 1, 0, 2, 7, 5, 4, 6]].reshape(2, 1, 1, 4, 1)
    mesh = jax.sharding.Mesh(devices, AXES)
    assert _only(_of(lambda x: lax.psum(x, "memory"), mesh)).axes == ("memory",)


class TestLoops:
    def test_scan_in_fori_loop(self, mesh):
        def f(x):
            def inner(x, _):
                return lax.psum(jnp.sin(x), "memory"), None

            def outer(_, x):
                x = lax.scan(inner, x, None, length=3)[0]
                return lax.all_gather(x, "data", tiled=True)[:4] * 2

            return lax.fori_loop(0, 5, outer, x)

        found = {collective.kind: collective for collective in _of(f, mesh)}
        assert {kind: one.loop_trip_count for kind, one in found.items()} == {
            "all-reduce": 15,
            "all-gather": 5,
        }
        assert all(one.in_loop and one.trips_known for one in found.values())
        assert summary(found.values()) == {
            ("all-reduce", ("memory",)): 15 * 2 * PART * 3 // 4,
            ("all-gather", ("data",)): 5 * PART,
        }
        # jax 0.10 calls the body of the scan "closed_call", 0.11 "eval_jaxpr".
        assert re.search(r"while/body/(closed_call|eval_jaxpr)/psum$", found["all-reduce"].op_name)

    def test_a_condition_a_branch_and_a_count_that_is_not_known(self, mesh):
        def f(x):
            def body(x):
                return 2 * lax.cond(x.sum() > 3, lambda x: lax.all_gather(x, "data")[1], lambda x: x, x)

            return lax.while_loop(lambda x: lax.psum(x.sum(), "memory") < 1000, body, x)

        found = {collective.kind: collective for collective in _of(f, mesh)}
        assert set(found) == {"all-reduce", "all-gather"}
        for one in found.values():
            assert (one.loop_trip_count, one.in_loop, one.trips_known) == (1, True, False)
        assert _bytes(found["all-reduce"]) == (4, 4, 6)


class TestSharding:
    """Collectives that the partitioner puts in."""

    def _reshard(self, mesh, before, after, to=None):
        x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, before))

        def f(x):
            return lax.with_sharding_constraint(jnp.sin(x), NamedSharding(to or mesh, after))

        return jax.jit(f).lower(x).compile().as_text()

    def test_gathers(self, mesh):
        found = collectives_of(self._reshard(mesh, P("data", "memory"), P()), mesh)
        assert sorted((one.kind, one.axes) for one in found) == [
            ("all-gather", ("data",)),
            ("all-gather", ("memory",)),
        ]
        whole = max(found, key=lambda one: one.result_bytes)
        assert whole.result_bytes == 16 * 8 * 4

    def test_axes_that_swap_their_places(self):
        mesh = _mesh(2, 1, 1, 2, 2)
        found = _only(collectives_of(self._reshard(mesh, P(("width", "data")), P()), mesh))
        assert (found.axes, _bytes(found)) == (("data", "width"), (128, 512, 384))

    def test_exchange(self):
        mesh = _mesh(2, 1, 1, 2, 2)
        found = _only(collectives_of(self._reshard(mesh, P("memory"), P(None, "memory")), mesh))
        assert (found.kind, found.axes, _bytes(found)) == ("all-to-all", ("memory",), (256, 256, 128))

    def test_part_of_an_axis(self, mesh):
        text = self._reshard(mesh, P("memory"), P("memory"), to=_mesh(2, 1, 1, 2, 2))
        found = _only(collectives_of(text, mesh))
        assert (found.axes, found.group_size) == ((), 2)
        assert _only(collectives_of(text, _mesh(2, 1, 1, 2, 2))).axes == ("width",)

    def test_a_product(self, mesh):
        def f(x):
            return lax.with_sharding_constraint(x.T @ x, NamedSharding(mesh, P()))

        x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, P("memory")))
        found = _only(collectives_of(jax.jit(f).lower(x).compile().as_text(), mesh))
        assert (found.kind, found.axes, found.operand_bytes) == ("all-reduce", ("memory",), 8 * 8 * 4)


@pytest.mark.parametrize(
    "groups, axes, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("memory",), 4),
        ("{{3,1,2,0},{4,7,6,5}}", ("memory",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{{0,1},{2,3},{4,5},{6,7}}", (), 2),
        ("{{0,1,2,3}}", (), 4),
        ("{}", ("data", "memory"), 8),
        ("[2,4]<=[8]", ("memory",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[4,2]<=[8]", (), 2),
        ("[1,8]<=[2,4]T(1,0)", ("data", "memory"), 8),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_2'}", ("memory",), 4),
        ("mesh['a'=2,'b'=4] {'b','a'}", ("data", "memory"), 8),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", (), 2),
        ("mesh['a'=2,'b'=4] {'b':(1)2,'b':(2)2}", ("memory",), 4),
        ("mesh['x'=8] {'x':(1)2}", ("data",), 2),
        ("mesh['x'=8] {'x':(2)4}", ("memory",), 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ("memory",), 4),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", (), 2),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",), 2),
    ],
)
def test_notations_of_groups(mesh, groups, axes, size):
    text = f"""HloModule m, num_partitions=8

ENTRY %main (x: f32[4,8]) -> f32[64,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  ROOT %g = f32[64,8]{{1,0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}
"""
    found = _only(collectives_of(text, mesh))
    assert (found.axes, found.group_size) == (axes, size)


@pytest.mark.parametrize("groups", ["{{0},{1},{2},{3}}", "[8,1]<=[8]", "mesh['a'=1,'b'=8] {'a'}"])
def test_groups_of_one_are_left_out(mesh, groups):
    text = (
        f"ENTRY e {{\n  x = f32[4] parameter(0)\n  ROOT r = f32[4] all-gather(x), replica_groups={groups}\n}}"
    )
    assert collectives_of(text, mesh) == []


def test_unknown_notations_are_an_error(mesh):
    text = "ENTRY e {\n  x = f32[4] parameter(0)\n  ROOT r = f32[4] all-gather(x), replica_groups=new\n}"
    with pytest.raises(ValueError, match="unknown format"):
        collectives_of(text, mesh)
    with pytest.raises(ValueError, match="no entry"):
        collectives_of("", mesh)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("pred[4,8]{1,0}", 32),
        ("u8[4,8]", 32),
        ("s32[4,8]{1,0:T(4,128)}", 128),
        ("bf16[4,8]{1,0:T(8,128)(2,1)S(1)}", 64),
        ("f8e4m3fn[4,8]", 32),
        ("s4[5,3]{1,0:E(4)}", 8),
        ("c64[]", 8),
        ("f32[<=4,8]", 128),
        ("f64[0,8]", 0),
    ],
)
def test_types(mesh, shape, expected):
    for printed in ("x", f"{shape} %x"):
        text = f"ENTRY e {{\n  x = {shape} parameter(0)\n  ROOT r = {shape} all-to-all({printed})"
        found = _only(collectives_of(text + ", replica_groups={}\n}", mesh))
        assert _bytes(found) == (expected, expected, -(-expected * 7 // 8))


GPU = r"""
HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=8

%add (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  ROOT %r = f32[] add(f32[] %p, f32[] %p)
}

%scatter (s: f32[16,8]) -> f32[4,8] {
  %s = f32[16,8]{1,0} parameter(0)
  ROOT %rs = f32[4,8]{1,0} reduce-scatter(f32[16,8]{1,0} %s), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}, execution_thread="parallel"

%unreached (u: f32[16,8]) -> f32[16,8] {
  %u = f32[16,8]{1,0} parameter(0)
  ROOT %ar = f32[16,8]{1,0} all-reduce(f32[16,8]{1,0} %u), channel_id=5, replica_groups={}, to_apply=%add
}

%body (b: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %b = (s32[], f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element((s32[], f32[16,8]{1,0}) %b), index=0
  %v = f32[16,8]{1,0} get-tuple-element((s32[], f32[16,8]{1,0}) %b), index=1
  %cps = (f32[16,8]{1,0}, f32[16,8]{1,0}, u32[], u32[]) collective-permute-start(f32[16,8]{1,0} %v), channel_id=6, source_target_pairs={{0,4},{1,5},{2,6},{3,7},{4,0},{5,1},{6,2},{7,3}}, metadata={op_name="jit(step)/body=%add(\"x\")/ppermute"}
  %cpd = f32[16,8]{1,0} collective-permute-done((f32[16,8]{1,0}, f32[16,8]{1,0}, u32[], u32[]) %cps)
  ROOT %t = (s32[], f32[16,8]{1,0}) tuple(s32[] %i, f32[16,8]{1,0} %cpd)
}

%condition (c: (s32[], f32[16,8])) -> pred[] {
  %c = (s32[], f32[16,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: f32[16,8], y: bf16[3]) -> f32[4,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %y = bf16[3]{0} parameter(1)
  %ars = (f32[16,8]{1,0}, bf16[3]{0}) all-reduce-start(f32[16,8]{1,0} %x, bf16[3]{0} %y), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true, to_apply=%add
  %ard = (f32[16,8]{1,0}, bf16[3]{0}) all-reduce-done((f32[16,8]{1,0}, bf16[3]{0}) %ars)
  %ags = ((f32[16,8]{1,0}, bf16[3]{0}), (f32[64,8]{1,0}, bf16[12]{0})) all-gather-start(f32[16,8]{1,0} %x, bf16[3]{0} %y), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %agd = (f32[64,8]{1,0}, bf16[12]{0}) all-gather-done(((f32[16,8]{1,0}, bf16[3]{0}), (f32[64,8]{1,0}, bf16[12]{0})) %ags)
  %zero = s32[] constant(0)
  %init = (s32[], f32[16,8]{1,0}) tuple(s32[] %zero, f32[16,8]{1,0} %x)
  %loop = (s32[], f32[16,8]{1,0}) while((s32[], f32[16,8]{1,0}) %init), condition=%condition, body=%body, backend_config="{\"known_trip_count\":{\"n\":\"7\"}}"
  %out = f32[16,8]{1,0} get-tuple-element((s32[], f32[16,8]{1,0}) %loop), index=1
  %rss = ((f32[16,8]{1,0}), f32[4,8]{1,0}, s32[]) async-start(f32[16,8]{1,0} %out), async_execution_thread="parallel", calls=%scatter
  %rsu = ((f32[16,8]{1,0}), f32[4,8]{1,0}, s32[]) async-update(((f32[16,8]{1,0}), f32[4,8]{1,0}, s32[]) %rss), calls=%scatter
  ROOT %rsd = f32[4,8]{1,0} async-done(((f32[16,8]{1,0}), f32[4,8]{1,0}, s32[]) %rsu), calls=%scatter
}
"""  # noqa: E501
"""Asynchronous pairs, operands with their shapes."""

TPU = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%add.clone (p: bf16[], q: bf16[]) -> bf16[] {
  %p = bf16[]{:T(256)} parameter(0)
  %q = bf16[]{:T(256)} parameter(1)
  ROOT %r = bf16[]{:T(256)} add(%p, %q)
}

%fused_computation (f: bf16[16,128]) -> bf16[16,128] {
  %f = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ar.1 = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} all-reduce(%f), channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add.clone, metadata={op_name="jit(step)/psum"}
}

ENTRY %main.1_spmd (x.1: bf16[16,128]) -> bf16[4,128] {
  %x.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[2,4]<=[8]}
  %fusion = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x.1), kind=kCustom, calls=%fused_computation
  %a = bf16[4,128]{1,0:T(4,128)(2,1)} slice(%fusion), slice={[0:4], [0:128]}
  %a2a = (bf16[4,128]{1,0:T(4,128)(2,1)}, bf16[4,128]{1,0:T(4,128)(2,1)}, bf16[4,128]{1,0:T(4,128)(2,1)}, bf16[4,128]{1,0:T(4,128)(2,1)}, bf16[4,128]{1,0:T(4,128)(2,1)}, /*index=5*/bf16[4,128]{1,0:T(4,128)(2,1)}, bf16[4,128]{1,0:T(4,128)(2,1)}, bf16[4,128]{1,0:T(4,128)(2,1)}) all-to-all(%a, %a, %a, %a, %a, /*index=5*/%a, %a, %a), channel_id=2, replica_groups={}
  %rs.s = ((bf16[16,128]{1,0:T(8,128)(2,1)S(1)}), bf16[4,128]{1,0:T(4,128)(2,1)}, u32[]{:S(2)}) reduce-scatter-start(%fusion), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, to_apply=%add.clone
  %rs.d = bf16[4,128]{1,0:T(4,128)(2,1)} reduce-scatter-done(%rs.s)
  %sizes = s32[8]{0:T(128)} constant({1, 1, 1, 1, 1, 1, 1, 1})
  %ragged = bf16[32,128]{1,0:T(8,128)(2,1)} broadcast(%rs.d), dimensions={}
  %ra2a = bf16[32,128]{1,0:T(8,128)(2,1)} ragged-all-to-all(%fusion, %ragged, %sizes, %sizes, %sizes, /*index=5*/%sizes), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %out = bf16[4,128]{1,0:T(4,128)(2,1)} custom-call(%ra2a), custom_call_target="Sharding", called_computations={}
}
"""  # noqa: E501
"""Tiled layouts, operands without shapes, comments in long lists."""


def test_text_of_a_gpu(mesh):
    found = collectives_of(GPU, mesh)
    assert [(one.kind, one.axes, *_bytes(one), one.loop_trip_count) for one in found] == [
        ("all-reduce", ("data",), 518, 518, 518, 1),
        ("all-gather", ("memory",), 518, 2072, 1554, 1),
        ("collective-permute", ("data",), 512, 512, 512, 7),
        ("reduce-scatter", ("memory",), 512, 128, 384, 1),
    ]
    assert found[2].op_name == r"jit(step)/body=%add(\"x\")/ppermute"
    assert summary(found)["collective-permute", ("data",)] == 3584


def test_text_of_a_tpu(mesh):
    found = collectives_of(TPU, mesh)
    assert [(one.kind, one.axes, *_bytes(one)) for one in found] == [
        ("all-reduce", ("memory",), 4096, 4096, 6144),
        ("all-to-all", ("data", "memory"), 8192, 8192, 7168),
        ("reduce-scatter", ("memory",), 4096, 1024, 3072),
        ("ragged-all-to-all", ("data", "memory"), 4096, 8192, 3584),
    ]
    assert [one.op_name for one in found] == ["jit(step)/psum", "", "", ""]


def test_a_computation_called_twice_and_the_condition_of_a_loop():
    text = """ENTRY %main {
  %x = f32[4] parameter(0)
  %a = f32[4] call(%x), to_apply=%f
  %b = f32[4] conditional(%a, %x, %x), true_computation=%f, false_computation=%g
  ROOT %w = f32[4] while(%b), condition=%f, body=%g, backend_config={"known_trip_count":{"n":"3"}}
}
%f (y: f32[4]) -> f32[4] {
  %y = f32[4] parameter(0)
  ROOT %r = f32[4] all-reduce(%y), replica_groups={{0,1}}
}
%g (y: f32[4]) -> f32[4] {
  ROOT %y = f32[4] parameter(0)
}
"""
    found = collectives_of(text, None)
    assert [one.loop_trip_count for one in found] == [1, 1, 4]
    assert summary(found) == {("all-reduce", ()): 6 * 16}
