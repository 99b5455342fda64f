"""A training step on a mesh sends what was predicted, and no more with more slots."""

from dataclasses import replace

import pytest

from tests.support.mesh_step import (
    BOTH,
    MEMORY,
    MICRO_BATCHES,
    SAME_TOKENS,
    TRAIN,
    TWO_AXES,
    V2,
    compiled,
    lowered,
    run_config,
)
from tests.support.users_compiler import memory_analysis
from ultramem_jax.accounting import step_transfers
from ultramem_jax.config import MeshConfig, MoEConfig
from ultramem_jax.config import exchange_purposes as purposes
from ultramem_jax.kernels import native
from ultramem_jax.ops.exchanges import purposes_of
from ultramem_jax.parallel.collectives import collectives_of, summary
from ultramem_jax.planning.traffic import grouped
from ultramem_jax.presets import families

MESH = MeshConfig(data=2, memory=4)
SLOTS, WIDTH = (run_config(MEMORY.changed(partition=p), MESH) for p in ("slots", "width"))
NGRAMS = families.engram(
    placement="before@1", rows_per_head=(100,), heads_per_order=4, value_dim=8, row_multiple=8
)
SENDERS = {
    "slots": SLOTS,
    "width": WIDTH,
    "micro-batches": MICRO_BATCHES,
    "same tokens": SAME_TOKENS,
    "fsdp": run_config(MEMORY, MeshConfig(data=2, fsdp=2, memory=2)),
    "balance": run_config(V2.changed(num_keys=64, pre_value_dim=4), MESH),
    "selected rows": replace(
        BOTH, train=replace(TRAIN, slots_per_step=5, slot_score="kl", background="counts.npz")
    ),
    "tensor": run_config(MEMORY, MeshConfig(data=2, tensor=2, memory=2)),
    "n-grams by slots": run_config(NGRAMS, MESH),
    "n-grams by both": run_config(NGRAMS.changed(partition="both"), TWO_AXES),
    "experts": replace(
        SLOTS,
        model=replace(SLOTS.model, memories={}, moe=MoEConfig(num_experts=8, expert_dim=8)),
    ),
}

DENSE_TABLES = replace(SLOTS, train=replace(SLOTS.train, table_gradient="dense"))
SAME_FOR_EXPERTS = replace(SENDERS["experts"], mesh=replace(MESH, batch_over_memory=False))


def _sent(config):
    """Bytes by kind and axes that the compiled step sends."""
    step, _, axes = compiled(config)
    # What loops of unknown length send is left out: further rounds of an exchange between experts, of which
    # there are none as long as the router does not prefer any.
    found = [c for c in collectives_of(step.as_text(), axes.mesh) if c.trips_known]
    return summary(found)


def _predicted(config):
    total = {}
    for transfer in step_transfers(config, compiled(config).axes.mesh.shape):
        key = transfer.kind, transfer.axes
        total[key] = total.get(key, 0) + transfer.moved_bytes
    return total


@pytest.mark.parametrize("name", SENDERS)
def test_collectives_of_a_step_are_those_predicted(name):
    found, predicted = _sent(SENDERS[name]), _predicted(SENDERS[name])
    scalars = 256  # bytes: losses and metrics
    for key in found.keys() | predicted.keys():
        sent, expected = found.get(key, 0), predicted.get(key, 0)
        assert abs(sent - expected) <= 0.05 * expected + scalars, key
    if name in ("slots", "width"):  # what tables need is exact
        tables, expected = (
            {key: moved for key, moved in of.items() if key[0] != "all-reduce"} for of in (found, predicted)
        )
        assert tables == expected and len(tables) == (3 if name == "slots" else 4)


OURS = {getattr(purposes, name) for name in vars(purposes) if name.isupper()} - {
    purposes.GRADIENTS_OF_PARAMETERS,
    purposes.BALANCE_LOSSES,
    purposes.PARAMETERS_FOR_THE_STEP,
    purposes.SUMS_OVER_TENSOR,
    purposes.LOSSES_AND_METRICS,
}
"""Purposes of the exchanges that the library writes itself, not the compiler."""


@pytest.mark.parametrize("name", SENDERS | {"dense tables": None, "same tokens for experts": None})
def test_every_exchange_carries_its_purpose(name):
    config = {**SENDERS, "dense tables": DENSE_TABLES, "same tokens for experts": SAME_FOR_EXPERTS}[name]
    step, _, axes = compiled(config)
    transfers = step_transfers(config, axes.mesh.shape)
    rows = [
        row for row in grouped(collectives_of(step.as_text(), axes.mesh), transfers) if row.purpose in OURS
    ]
    assert rows or name == "tensor"
    for row in rows:
        # The compiler joins the gradients of experts to others that are summed over the same devices.
        joined = name == "same tokens for experts" and row.purpose == purposes.GRADIENTS_OF_EXPERTS
        if row.purpose != purposes.OVERFLOW_OF_EXPERTS and not joined:
            assert row.compiled_bytes == pytest.approx(row.formula_bytes, rel=0.01), row


def test_means_over_columns_are_sent_for_every_place_of_the_chunks_of_reads(without_kernels):
    config = replace(WIDTH, train=replace(WIDTH.train, row_second_moment="row"))
    step, _, axes = compiled.__wrapped__(config)  # not the one with kernels
    means = [c for c in collectives_of(step.as_text(), axes.mesh) if not c.trips_known]
    # The reads of this batch, 8 sequences of 16 tokens with 16 reads, are one chunk.
    predicted = {t.name: t.moved_bytes for t in step_transfers(config, axes.mesh.shape)}
    assert [c.moved_bytes for c in means] == [predicted["means over the columns of rows"]]
    assert means[0].operand_bytes == 4 * 8 * 16 * 16


@pytest.mark.skipif(not native.status().on, reason=str(native.status()))
def test_kernels_send_one_mean_for_every_row_that_may_be_read():
    config = replace(WIDTH, train=replace(WIDTH.train, row_second_moment="row"))
    step, _, axes = compiled(config)
    found = collectives_of(step.as_text(), axes.mesh)
    (means,) = [c for c in found if purposes_of(c.op_name) == (purposes.MEANS_OVER_COLUMNS,)]
    # Rows of the table, and one that stands for those of other devices.
    assert means.operand_bytes == 4 * min(8 * 16 * 16, config.model.sites[0].num_slots + 1)


def test_every_rule_that_takes_means_over_columns_sends_them():
    shape = compiled(WIDTH).axes.mesh.shape
    rules = {
        "row": dict(row_second_moment="row"),
        "adagrad_row": dict(row_optimizer="adagrad_row"),
        "catch up": dict(row_optimizer="adamw_catch_up"),
        "sgd": dict(row_optimizer="sgd"),
    }
    sent = {
        name: {t.name for t in step_transfers(replace(WIDTH, train=replace(WIDTH.train, **fields)), shape)}
        for name, fields in rules.items()
    }
    assert sent["adagrad_row"] == sent["row"] == sent["sgd"] | {"means over the columns of rows"}
    assert sent["catch up"] == sent["sgd"]


@pytest.mark.parametrize("config", [SLOTS, WIDTH], ids=["slots", "width"])
def test_more_slots_send_no_more(config):
    memory = config.model.memory.changed(num_keys=8)
    few, many = (_sent(c) for c in (config, run_config(memory, MESH)))
    gradients = ("all-reduce", ("data", "memory"))
    # Four times the slots are twice the keys. Their gradient is summed like that of every dense parameter:
    # 2 sides, H 2, √E·4 more keys, d_k 8, four bytes.
    keys = 2 * 2 * 2 * 4 * 8 * 4
    assert many.pop(gradients) - few.pop(gradients) == pytest.approx(2 * 7 / 8 * keys, abs=8)
    assert many == few


def test_more_slots_with_as_many_keys_send_the_same():
    # The window that a memory reads of a ring of four times the slots is a quarter of it.
    ring = V2.changed(pre_value_dim=4)
    few, many = (
        _sent(run_config(ring.changed(num_keys=n, share_ratio=share), MESH))
        for n, share in ((4, 1.0), (8, 0.25))
    )
    assert few == many


@pytest.mark.parametrize("partition", ["slots", "width"])
def test_tables_are_updated_in_place_on_every_device(partition):
    memory = MEMORY.changed(num_keys=1024, value_dim=32, top_m=4, partition=partition)
    step, *_ = lowered(run_config(memory, MESH))
    analysis = memory_analysis(step)
    part = 1024**2 * 32 * 4 // MESH.memory
    assert analysis.alias_size_in_bytes > 3 * part  # table and moments
    assert analysis.temp_size_in_bytes < 0.1 * part
