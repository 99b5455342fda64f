import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support import row_updates
from tests.support.chunk_values import set_chunk_values
from ultramem_jax.kernels.rules import RowKernel
from ultramem_jax.ops.lookup import GradientsOfReads, RowGradients, rows_read
from ultramem_jax.ops.rows import from_stored, stored_dtype, to_stored
from ultramem_jax.training.row_rules import RowMoments, adamw
from ultramem_jax.training.row_sparse import row_sparse, update_by_reads
from ultramem_jax.training.slot_usage import init_usage, record_reads

SEED = np.uint32(7)


def _adamw_by_hand(rows, first, second, gradients, step, second_moment="element"):
    rule = RowKernel("adamw", 0.1, 0.9, 0.95, 1e-8, one_per_row=second_moment == "row")
    return row_updates.after_step(rule, [rows, first, second], gradients, step, 0.1)


def _optimizer(**kept):
    return row_sparse(adamw(0.9, 0.95, 1e-8, 0.1, **kept), lambda step: 0.1)


def test_touched_rows_follow_adamw_and_the_rest_keeps_every_bit():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((12, 3)), jnp.float32)
    moments = RowMoments(*(jnp.asarray(rng.uniform(size=(12, 3)), jnp.float32) for _ in range(2)))
    # Rows 2, 7 and 11 of 12, and padding behind them; what the padding holds must not matter.
    slots = jnp.array([2, 7, 11, 15, 16], jnp.int32)
    values = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    step = jnp.asarray(4, jnp.int32)
    update = jax.jit(_optimizer().update)
    after, after_moments, norm, _ = update(RowGradients(slots, values), moments, table, step, SEED)
    read = np.array([2, 7, 11])
    expected = _adamw_by_hand(
        *(np.asarray(a, np.float64)[read] for a in (table, *moments)), np.asarray(values, np.float64)[:3], 4
    )
    assert norm == pytest.approx(np.linalg.norm(expected[0]), rel=1e-5)
    others = np.setdiff1d(np.arange(12), read)
    before = (table, *moments)
    for found, wanted, old in zip((after, *after_moments), expected, before, strict=True):
        chex.assert_trees_all_close(found[read], wanted, rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_equal(found[others], old[others])


def test_chunks_of_rows_change_no_bit(monkeypatch):
    rng = np.random.default_rng(2)
    table = jnp.asarray(rng.standard_normal((40, 3)), jnp.float32)
    moments = RowMoments(*(jnp.asarray(rng.uniform(size=(40, 3)), jnp.float32) for _ in range(2)))
    slots = jnp.concatenate([jnp.arange(0, 34, 2), jnp.array([44, 45, 46])]).astype(jnp.int32)
    gradients = RowGradients(slots, jnp.asarray(rng.standard_normal((20, 3)), jnp.float32))
    for kept in ({}, {"moment_dtype": "bfloat16", "second_moment": "row"}):
        optimizer = _optimizer(**kept)
        start = optimizer.init(table) if kept else moments
        arguments = gradients, start, table, jnp.asarray(2), SEED
        whole = jax.jit(optimizer.update, static_argnames="record")(*arguments, record=True)
        with monkeypatch.context() as patch:
            set_chunk_values(patch, 3 * 8 * 6)  # six rows at a time: 20 = 6 + 6 + 6 + 2
            by_chunks = jax.jit(_optimizer(**kept).update, static_argnames="record")(*arguments, record=True)
        for field in ("table", "moments", "before"):
            chex.assert_trees_all_equal(getattr(whole, field), getattr(by_chunks, field))
        assert by_chunks.norm == pytest.approx(float(whole.norm), rel=1e-6)
        # What was overwritten: rows 0, 2, ..., 32, of the table and of each moment.
        for rows, array in zip(jax.tree.leaves(whole.before), jax.tree.leaves((table, start)), strict=True):
            chex.assert_trees_all_equal(rows[:17], array[:34:2])


def test_repeated_and_unsorted_reads_are_one_update_of_their_sum():
    # Slot 3 is read three times, slot 1 twice, slot 5 once, in no order.
    rng = np.random.default_rng(3)
    reads = jnp.array([[3, 5, 1], [1, 3, 3]], jnp.int32)
    scores, cotangent = rng.standard_normal((2, 3, 1)), rng.standard_normal((2, 1, 4))
    of_reads = GradientsOfReads(
        rows_read(reads, 8),
        jnp.zeros_like(reads),
        jnp.asarray(scores, jnp.float32),
        jnp.asarray(cotangent, jnp.float32),
    )
    table = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)
    optimizer = _optimizer()
    update = jax.jit(functools.partial(update_by_reads, optimizer))
    after = update(of_reads, optimizer.init(table), table, jnp.asarray(0), SEED).table
    summed = np.zeros((8, 4))
    for token in range(2):
        for read in range(3):
            summed[reads[token, read]] += scores[token, read, 0] * cotangent[token, 0]
    expected, _, _ = _adamw_by_hand(np.asarray(table, np.float64), 0.0, 0.0, summed, 0)
    read = np.array([1, 3, 5])
    chex.assert_trees_all_close(after[read], expected[read], rtol=1e-5)
    chex.assert_trees_all_equal(np.delete(after, read, 0), np.delete(table, read, 0))


def test_a_second_moment_per_row_is_the_mean_of_the_squares():
    rng = np.random.default_rng(4)
    table = jnp.asarray(rng.standard_normal((5, 4)), jnp.float32)
    optimizer = _optimizer(second_moment="row")
    moments = RowMoments(
        jnp.asarray(rng.standard_normal((5, 4)), jnp.float32),
        jnp.asarray(rng.uniform(size=(5, 1)), jnp.float32),
    )
    slots, values = jnp.array([0, 3, 5], jnp.int32), rng.standard_normal((3, 4))
    gradients = RowGradients(slots, jnp.asarray(values, jnp.float32))
    after, after_moments, *_ = jax.jit(optimizer.update)(gradients, moments, table, jnp.asarray(4), SEED)
    read = np.array([0, 3])
    rows, first, second = (np.asarray(a, np.float64)[read] for a in (table, *moments))
    expected = _adamw_by_hand(rows, first, second, values[:2], 4, "row")
    chex.assert_trees_all_close(after[read], expected[0], rtol=1e-4, atol=1e-6)
    for found, wanted in zip(after_moments, expected[1:], strict=True):
        chex.assert_trees_all_close(found[read], wanted, rtol=1e-5)
    chex.assert_shape(optimizer.init(table).second, (5, 1))


def test_bfloat16_rows_follow_the_float32_ones_on_average():
    # An update of a hundredth of the last bit: to nearest nothing ever happens.
    table = to_stored(jnp.ones((512, 8)), stored_dtype("bfloat16"))
    slots = jnp.arange(512, dtype=jnp.int32)
    ends = {}
    for rounding in ("stochastic", "nearest"):
        rule = adamw(0.9, 0.95, 1e-8, 0.0, moment_dtype="bfloat16")
        optimizer = row_sparse(rule, lambda step: 1e-4, rounding=rounding)
        update = jax.jit(optimizer.update)
        rows, moments = table, optimizer.init(table)
        chex.assert_type([moments.first, moments.second], jnp.uint16)
        for step in range(30):
            gradients = RowGradients(slots, jnp.full((512, 8), -0.3))
            seed = jnp.asarray(step, jnp.uint32)
            rows, moments, norm, _ = update(gradients, moments, rows, jnp.asarray(step), seed)
        ends[rounding] = np.asarray(from_stored(rows), np.float64)
        # The norm is that of the last rows before they are rounded.
        assert float(norm) == pytest.approx(np.linalg.norm(ends[rounding]), rel=1e-3)
        # 4096 values of standard deviation below 0.01 each.
        mean = np.asarray(from_stored(moments.first), np.float64).mean()
        assert mean == pytest.approx(-0.3 * (1 - 0.9**30), rel=2e-3)
    assert (ends["nearest"] == 1).all()
    # Thirty steps of 1e-4, give or take 5 standard errors. A value has moved by 0 or by 1/128, so it deviates
    # by less than 0.004.
    assert ends["stochastic"].mean() == pytest.approx(1.003, abs=5 * 0.004 / np.sqrt(4096))


def test_equals_optax_where_every_row_is_read():
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)

    def rate(step):
        return 0.1 / (1 + step)

    ours, theirs = (
        row_sparse(adamw(0.9, 0.95, 1e-8, 0.1), rate),
        optax.adamw(rate, 0.9, 0.95, 1e-8, weight_decay=0.1),
    )
    sparse, moments = table, ours.init(table)
    dense, state = table, theirs.init(table)
    for step in range(5):
        grads = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)
        rows = RowGradients(jnp.arange(6, dtype=jnp.int32), grads)
        sparse, moments, *_ = ours.update(rows, moments, sparse, jnp.asarray(step), SEED)
        change, state = theirs.update(grads, state, dense)
        dense = optax.apply_updates(dense, change)
    chex.assert_trees_all_close(sparse, dense, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(moments.first, state[0].mu, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_close(moments.second, state[0].nu, rtol=1e-6, atol=1e-7)


def test_usage_counts_rows_once_and_entropy_is_that_of_the_reads():
    usage = init_usage(10)
    # Slot 3 four times, slots 5 and 9 twice each: entropy of (1/2, 1/4, 1/4) is 1.5 bits.
    usage, metrics = record_reads(usage, rows_read(jnp.array([3, 5, 3, 9, 3, 9, 5, 3]), 10), 8)
    assert metrics["slots_read_share"] == pytest.approx(0.3)
    assert metrics["read_entropy"] == pytest.approx(1.5 * np.log(2), rel=1e-6)
    usage, metrics = record_reads(usage, rows_read(jnp.array([3, 0]), 10), 2)
    assert metrics["slots_read_share"] == pytest.approx(0.4)
    assert metrics["read_entropy"] == pytest.approx(np.log(2), rel=1e-6)
    chex.assert_trees_all_equal(np.flatnonzero(usage.seen), np.array([0, 3, 5, 9]))
