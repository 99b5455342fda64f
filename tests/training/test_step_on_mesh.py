"""Training on a mesh of eight simulated devices equals training on one."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.chunk_values import set_chunk_values
from tests.support.mesh_step import (
    BOTH,
    MEMORY,
    MICRO_BATCHES,
    SAME_TOKENS,
    TRAIN,
    TWO_AXES,
    V2,
    run,
    run_config,
)
from tests.support.users_compiler import fuse_as_for_users
from ultramem_jax.config import DataConfig, MeshConfig
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes, one_device
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.row_sparse import ROW_ARRAYS
from ultramem_jax.training.state import abstract_state, fresh_state


@functools.cache
def _on_one_device(config, steps):
    return jax.tree.map(np.asarray, run(config, steps, alone=True))


def _expected(config, steps):
    memory = config.model.memory.changed(partition="slots")
    model = replace(config.model, memories={"memory": memory})
    return _on_one_device(replace(config, model=model, mesh=MeshConfig()), steps)


def _assert_equal(config, steps):
    expected, expected_losses, expected_metrics = _expected(config, steps)
    state, losses, metrics = run(config, steps)
    chex.assert_trees_all_close(losses, expected_losses, rtol=2e-6)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=2e-4, atol=1e-6)
    # The sums of a step are made in another order, and 20 steps of Adam amplify what that changes.
    chex.assert_trees_all_close(state.tables, expected.tables, rtol=1e-4, atol=2e-5)
    chex.assert_trees_all_close(state.table_state, expected.table_state, rtol=1e-3, atol=2e-7)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-4, atol=2e-5)
    chex.assert_trees_all_equal(state.usage, expected.usage)


@pytest.mark.parametrize(
    ("data", "memory", "partition"),
    [
        (8, 1, "slots"),
        (4, 2, "slots"),
        (4, 2, "width"),
        (2, 4, "slots"),
        (2, 4, "width"),
        (1, 8, "slots"),
        (1, 8, "width"),
    ],
)
def test_twenty_steps_equal_those_of_one_device(data, memory, partition):
    _assert_equal(run_config(MEMORY.changed(partition=partition), MeshConfig(data=data, memory=memory)), 20)


OTHERS = {
    "both": BOTH,
    "both, the same tokens on all owners": SAME_TOKENS,
    "pre-values in a ring, micro-batches": MICRO_BATCHES,
    "a dense gradient": replace(BOTH, train=replace(TRAIN, table_gradient="dense")),
    "catching up": replace(
        BOTH, train=replace(TRAIN, row_optimizer="adamw_catch_up", row_second_moment="row")
    ),
    "row-wise Adagrad": replace(BOTH, train=replace(TRAIN, row_optimizer="adagrad_row")),
    "SGD, which keeps nothing": replace(BOTH, train=replace(TRAIN, row_optimizer="sgd")),
    "fsdp and tensor": run_config(MEMORY, MeshConfig(data=1, fsdp=2, tensor=2, memory=2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_meshes_equal_one_device(name):
    _assert_equal(OTHERS[name], 3)


def test_rows_that_go_on_from_one_chunk_to_the_next(monkeypatch):
    # Some reads at a time of 1024, of 16 rows: rows span many chunks.
    config = replace(BOTH, data=DataConfig(seq_len=8))
    expected, *_ = _expected(config, 1)
    set_chunk_values(monkeypatch, 7 * ROW_ARRAYS * 4)
    state, *_ = run(config, 1)
    ours, theirs = ((s.tables, s.table_state) for s in (state, expected))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_rounded_tables_are_those_of_one_device():
    # Which way a value is rounded is drawn by its row and column in the whole table.
    memory = MEMORY.changed(dtype="bfloat16", partition="both")
    train = replace(TRAIN, row_moment_dtype="bfloat16", row_second_moment="row")
    config = run_config(memory, TWO_AXES, train)
    ours, theirs = (s[0].tables["memory_0"]["values"] for s in (run(config, 2), _expected(config, 2)))
    chex.assert_type(ours, jnp.uint16)
    # A value in a thousand may fall to the other side of its draw.
    assert (np.asarray(ours) != theirs).mean() < 1e-3


def test_a_fresh_state_lies_on_the_mesh_and_holds_the_numbers_of_one_device(monkeypatch):
    fuse_as_for_users(monkeypatch)
    # More than one block is drawn, and the last one overlaps; parts begin inside of blocks.
    memory = V2.changed(partition="both", num_keys=272, value_dim=16, pre_value_dim=4, placement="1:1")
    config = run_config(memory, TWO_AXES)
    axes, optimizers = mesh_axes(config, make_mesh(config.mesh)), make_optimizers(config)
    ours = fresh_state(config, optimizers, axes, np.uint32(3))
    theirs = fresh_state(config, optimizers, one_device(), np.uint32(3))
    chex.assert_trees_all_equal(ours, theirs)
    placed = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim),
        ours,
        abstract_state(config, optimizers, axes),
    )
    assert all(jax.tree.leaves(placed))
    table = ours.tables["memory_tables"]["values"]
    chex.assert_shape(table, (272**2, 16))
    assert {s.data.shape for s in table.addressable_shards} == {(272**2 // 2, 8)}
