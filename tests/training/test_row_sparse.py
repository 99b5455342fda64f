import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ultramem_jax.ops.lookup import RowGradients, rows_read
from ultramem_jax.training.row_sparse import RowMoments, row_sparse_adamw
from ultramem_jax.training.slot_usage import init_usage, record_reads


def _adamw_by_hand(rows, first, second, grads, step, rate=0.1, b1=0.9, b2=0.95, eps=1e-8, decay=0.1):
    first, second = b1 * first + (1 - b1) * grads, b2 * second + (1 - b2) * grads**2
    unbiased = first / (1 - b1 ** (step + 1)), second / (1 - b2 ** (step + 1))
    return rows - rate * (unbiased[0] / (np.sqrt(unbiased[1]) + eps) + decay * rows), first, second


def _optimizer():
    return row_sparse_adamw(lambda step: 0.1, 0.9, 0.95, 1e-8, 0.1)


def test_touched_rows_follow_adamw_and_the_rest_keeps_every_bit():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((12, 3)), jnp.float32)
    moments = RowMoments(*(jnp.asarray(rng.uniform(size=(12, 3)), jnp.float32) for _ in range(2)))
    # Rows 2, 7 and 11 of 12, and padding behind them; what the padding holds must not matter.
    slots = jnp.array([2, 7, 11, 15, 16], jnp.int32)
    values = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    step = jnp.asarray(4, jnp.int32)
    update = jax.jit(_optimizer().update)
    after, after_moments, norm = update(RowGradients(slots, values), moments, table, step)
    read = np.array([2, 7, 11])
    expected = _adamw_by_hand(
        *(np.asarray(a, np.float64)[read] for a in (table, *moments)), np.asarray(values, np.float64)[:3], 4
    )
    assert norm == pytest.approx(np.linalg.norm(expected[0]), rel=1e-5)
    others = np.setdiff1d(np.arange(12), read)
    before = (table, *moments)
    for found, wanted, old in zip((after, *after_moments), expected, before, strict=True):
        np.testing.assert_allclose(found[read], wanted, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(found[others], old[others])


def test_equals_optax_where_every_row_is_read():
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)

    def rate(step):
        return 0.1 / (1 + step)

    ours, theirs = (
        row_sparse_adamw(rate, 0.9, 0.95, 1e-8, 0.1),
        optax.adamw(rate, 0.9, 0.95, 1e-8, weight_decay=0.1),
    )
    sparse, moments = table, ours.init(table)
    dense, state = table, theirs.init(table)
    for step in range(5):
        grads = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)
        rows = RowGradients(jnp.arange(6, dtype=jnp.int32), grads)
        sparse, moments, _ = ours.update(rows, moments, sparse, jnp.asarray(step))
        change, state = theirs.update(grads, state, dense)
        dense = optax.apply_updates(dense, change)
    np.testing.assert_allclose(sparse, dense, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.first, state[0].mu, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moments.second, state[0].nu, rtol=1e-6, atol=1e-7)


def test_usage_counts_rows_once_and_entropy_is_that_of_the_reads():
    usage = init_usage(10)
    # Slot 3 four times, slots 5 and 9 twice each: entropy of (1/2, 1/4, 1/4) is 1.5 bits.
    usage, metrics = record_reads(usage, rows_read(jnp.array([3, 5, 3, 9, 3, 9, 5, 3]), 10))
    assert metrics["slots_read_share"] == pytest.approx(0.3)
    assert metrics["read_entropy"] == pytest.approx(1.5 * np.log(2), rel=1e-6)
    usage, metrics = record_reads(usage, rows_read(jnp.array([3, 0]), 10))
    assert metrics["slots_read_share"] == pytest.approx(0.4)
    assert metrics["read_entropy"] == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(usage.seen), [0, 3, 5, 9])
