"""Collectives of a compiled step are counted by purpose, beside the formulas."""

import dataclasses

import pytest

from ultramem_jax.accounting import Transfer
from ultramem_jax.parallel.collectives import Collective
from ultramem_jax.planning.traffic import grouped, purpose, traffic


def test_collectives_equal_their_formulas_by_purpose(compiled):
    rows = {row.purpose: row for row in traffic(compiled) if row.formula_bytes is not None}
    assert set(rows) == {
        "reads to owners",
        "scores to owners",
        "pooled sums to tokens",
        "cotangents to owners",
        "score gradients to tokens",
        "reads and cotangents to replicas",
        "gradients of parameters",
    }
    for row in rows.values():
        # Metrics may travel with the gradients.
        assert row.compiled_bytes == pytest.approx(row.formula_bytes, rel=0.01), row
    # 64 tokens of a group, 4 reads of 4 bytes and one for the block; from 4 devices to 4.
    assert rows["reads to owners"].compiled_bytes == 64 * 4 * (4 + 1) * 3 // 4
    assert rows["gradients of parameters"].axes == ("data", "memory")


def collective(op_name, kind="all-gather", axes=("memory",), **fields):
    values = {
        "group_size": 4,
        "operand_bytes": 400,
        "result_bytes": 1600,
        "loop_trip_count": 1,
        "in_loop": False,
        "trips_known": True,
    }
    return Collective(kind=kind, axes=axes, op_name=op_name, **(values | fields))


FORWARD, BACKWARD = "jit(f)/jvp(Transformer)", "jit(f)/transpose(jvp(Transformer))"


@pytest.mark.parametrize(
    ("path", "kind", "axes", "expected"),
    [
        (
            f"{FORWARD}/memory_0/shard_map/exchange(scores to owners)/all_gather",
            "all-gather",
            "memory",
            "scores to owners",
        ),
        (
            f"{BACKWARD}/shard_map/transpose(jvp(exchange(tokens to experts and back)))/all_to_all",
            "all-to-all",
            "memory",
            "tokens to experts and back",
        ),
        (
            f"{BACKWARD}/(exchange(gradients of parameters)/psum:layer_1/dot_general)",
            "all-reduce",
            "data",
            "gradients of parameters",
        ),
        ("exchange(a)/psum:exchange(b)/psum:exchange(a)/psum", "all-reduce", "data", "a and b"),
        (f"{FORWARD}/layer_1/feed_forward/dot_general", "all-reduce", "tensor", "activations over tensor"),
        ("jit(f)/jvp()/sharding_constraint", "all-gather", "fsdp", "parameters for the step"),
        (f"{BACKWARD}/layer_1/dot_general", "all-reduce", "data", "gradients of parameters"),
        ("jit(f)/reduce_sum", "all-reduce", "data", "losses and metrics"),
    ],
)
def test_the_purpose_is_read_from_the_name_of_the_exchange(path, kind, axes, expected):
    assert purpose(collective(path, kind, (axes,))) == expected


def test_loops_of_unknown_length_are_counted_by_the_reads():
    loop = collective(
        "jit(f)/while/body/exchange(means over the columns of rows)/psum",
        "all-reduce",
        in_loop=True,
        trips_known=False,
        operand_bytes=400,
    )
    (row,) = grouped([loop], [], reads=1001)
    # 100 rows a pass: 11 passes, each of which sends 2·400·3/4 bytes.
    assert (row.times, row.compiled_bytes, row.sent_bytes) == (None, 11 * 600, 6600.0)
    overflow = dataclasses.replace(loop, op_name=f"{FORWARD}/while/body/exchange(overflow of experts)/psum")
    assert [row.compiled_bytes for row in grouped([overflow], [])] == [0]


def test_formulas_stand_beside_what_they_describe():
    experts = f"{FORWARD}/shard_map/exchange(tokens to experts and back)/all_to_all"
    found = [collective(experts, "all-to-all"), collective(experts, "all-to-all")]
    formulas = [
        Transfer("tokens to experts and back", "all-to-all", ("memory",), 200.0),
        Transfer("tokens to experts and back", "all-to-all", ("memory",), 100.0),
        Transfer("gradients of parameters", "all-reduce", ("data",), 700.0),
    ]
    first, second = grouped(found, formulas)
    assert (first.purpose, first.times, first.compiled_bytes) == ("gradients of parameters", None, None)
    assert (second.times, second.compiled_bytes, second.formula_bytes) == (2, 600, 300.0)
    assert second.sent_bytes == 300.0
