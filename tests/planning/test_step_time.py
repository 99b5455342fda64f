"""The time of a step is estimated from FLOPs, bytes and links, by hand."""

import dataclasses

import pytest

from tests.support.planned import MODEL, ROUND, TINY, by
from ultramem_jax import MeshConfig
from ultramem_jax.planning.compiled_step import DeviceBytes
from ultramem_jax.planning.programs import abstract_axes
from ultramem_jax.planning.step_time import (
    access_bytes,
    estimate_step,
    row_traffic,
    step_flops,
    touched_bytes,
    within_node,
)


def test_flops_are_shared_by_tokens_owners_and_tensor():
    # Per token: attention 2·4·16², MLP 2·2·16·32, attention scores 2·16·17; logits 2·16·24; of the memory
    # query 2·(256 + 64), keys 2·512, scoring 4·2·32 + 2·4·4 + 2·2·16 + 2·4·12, projection 2·512, lookup
    # 2·4·8.
    shared, logits, memory, lookup = 2048 + 2048 + 544, 768, 640 + 1024 + 448 + 1024, 64
    flops = step_flops(TINY, abstract_axes(TINY))
    assert flops == 3 * (16 * (shared + logits + memory) + 128 / 2 / 4 * lookup)
    mesh = MeshConfig(data=2, tensor=2, memory=2, batch_over_memory=False)
    config = dataclasses.replace(TINY, mesh=mesh)
    flops = step_flops(config, abstract_axes(config))
    assert flops == 3 * (64 * (shared / 2 + logits / 2 + memory) + 128 / 2 / 2 * lookup)


def test_narrow_columns_cost_a_whole_access():
    assert [access_bytes(of_row, 32) for of_row in (128, 40, 32, 2)] == [128, 64, 32, 32]
    axes = abstract_axes(by("slots"))
    whole_rows, updated = row_traffic(by("slots"), axes, 32)
    # 128 tokens read 4 rows of 32 bytes each, from 2 groups of 4 owners.
    assert whole_rows == 128 * 4 // 8 * 32
    # 64 rows and their two moments, of which 128 reads touch so many.
    assert updated == pytest.approx(3 * 2 * 64 * (1 - (63 / 64) ** 128) * 32)
    columns = by("width")
    axes = abstract_axes(columns)
    assert row_traffic(columns, axes, 8)[0] == whole_rows
    assert row_traffic(columns, axes, 32)[0] == 4 * whole_rows
    # In the order of the rows, four of 8 bytes share an access: 64 of these, 512 reads.
    assert row_traffic(columns, axes, 32)[1] == pytest.approx(6 * 64 * (1 - (63 / 64) ** 512) * 32)


def test_one_moment_per_row_costs_an_access_too():
    train = dataclasses.replace(TINY.train, row_second_moment="row", row_moment_dtype="bfloat16")
    config = dataclasses.replace(TINY, train=train)
    updated = row_traffic(config, abstract_axes(config), 32)[1]
    sizes = [touched_bytes(of_row, 64, 128, 32) for of_row in (32, 16, 4)]
    assert sizes[1] == pytest.approx(32 * (1 - (31 / 32) ** 128) * 32)
    assert sizes[2] == pytest.approx(8 * (1 - (7 / 8) ** 128) * 32)
    assert updated == pytest.approx(2 * sum(sizes))


def test_the_dense_way_updates_the_whole_table():
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, table_gradient="dense"))
    assert row_traffic(config, abstract_axes(config), 32)[1] == 7 * 4 * 8 * 64
    adagrad = dataclasses.replace(config.train, row_optimizer="adagrad_row")
    config = dataclasses.replace(config, train=adagrad)
    assert row_traffic(config, abstract_axes(config), 32)[1] == (3 * 4 * 8 + 2 * 4) * 64


def test_a_rule_that_keeps_nothing_moves_only_rows():
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, row_optimizer="sgd"))
    updated = row_traffic(config, abstract_axes(config), 32)[1]
    assert updated == pytest.approx(2 * touched_bytes(32, 64, 128, 32))


def test_a_selection_accesses_at_most_its_rows():
    def selecting(most):
        train = dataclasses.replace(TINY.train, slots_per_step=most, slot_score="reads")
        return dataclasses.replace(TINY, train=train)

    axes = abstract_axes(TINY)
    looked_up, whole = row_traffic(TINY, axes, 16)
    # Each of 4 owners has a quarter of the rows, whose values and moments are two accesses, read and written.
    assert row_traffic(selecting(8), axes, 16) == (looked_up, 8 // 4 * 3 * 2 * 16 * 2)
    assert row_traffic(selecting(1000), axes, 16) == (looked_up, whole)
    train = dataclasses.replace(TINY.train, slots_per_step=8, background="counts.npz")
    updated = row_traffic(dataclasses.replace(TINY, train=train), axes, 16)[1]
    # Four weights of the 64 rows of an owner share an access: 16 of these, 128 reads.
    assert updated == pytest.approx(8 // 4 * 3 * 2 * 16 * 2 + 16 * (1 - (15 / 16) ** 128) * 16)


def test_an_estimate_has_the_parts_of_a_step_and_two_bounds():
    axes = abstract_axes(TINY)
    state = DeviceBytes(1000, 2000, 0, 0, 0, 0, 0, 0)
    sent = {("memory",): 5000.0, ("data",): 200.0, ("data", "memory"): 100.0}
    estimate = estimate_step(TINY, axes, ROUND, state, 3000, sent)
    seconds = {part.name: part.seconds for part in estimate.parts}
    looked_up, updated = row_traffic(TINY, axes, 32)
    assert seconds == {
        "compute": step_flops(TINY, axes) / 1e6,
        "parameters and AdamW": (2 * 3000 + 7 * 1000) / 1e3,
        "rows, forward and backward": 2 * looked_up / 1e3,
        "update of rows": updated / 1e3,
        "sent along memory": 50.0,  # within a node
        "sent along data": 20.0,
        "sent along data × memory": 10.0,
    }
    assert estimate.by_resource["links between nodes"] == 30.0
    assert estimate.overlapped == 50.0
    assert estimate.sequential == pytest.approx(sum(seconds.values()))
    assert estimate.tokens == 128


def test_bfloat16_has_its_own_rate():
    axes = abstract_axes(TINY)
    half = dataclasses.replace(TINY, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    state = DeviceBytes(0, 0, 0, 0, 0, 0, 0, 0)
    ratio = [estimate_step(run, axes, ROUND, state, 0, {}).parts[0].seconds for run in (TINY, half)]
    assert ratio[0] / ratio[1] == pytest.approx(2000)


def test_minor_axes_lie_within_a_node():
    sizes = {"data": 4, "tensor": 2, "memory": 8}
    assert within_node(sizes, ("memory",), 8) and within_node(sizes, ("tensor", "memory"), 16)
    assert not within_node(sizes, ("memory",), 4) and not within_node(sizes, ("tensor",), 8)
    assert not within_node(sizes, ("data",), 16) and within_node(sizes, ("data",), 64)
    assert not within_node(sizes, (), 8) and within_node(sizes, (), 64)
