"""Sums by row without scatters: equal to float64, with the same bits in every run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.algorithms import choosing
from ultramem_jax.ops.embedding import embed
from ultramem_jax.ops.row_sums import counted, runs_of, sorted_rows, sums_of_rows
from ultramem_jax.platforms import targeting

PRODUCTS = {"sums_by_row": "products", "sort": "pairs"}
# Reads and rows: one read, many of few rows (over several groups of 128), few of many, and every row hot.
SIZES = [(1, 5), (300, 7), (1000, 1_000_000), (1000, 200), (128, 1), (1025, 3), (2048, 900), (700, 1)]


def _reads(count, num_rows, width=3):
    rng = np.random.default_rng(count + num_rows)
    return rng.integers(0, num_rows, count).astype(np.int32), rng.standard_normal((count, width)).astype(
        np.float32
    )


def _sums(rows, reads, num_rows):
    found = sorted_rows(rows, num_rows)
    return found, sums_of_rows(reads[found.order], found.row_of_read, found.counts)


@pytest.mark.parametrize("count, num_rows", SIZES)
def test_sums_equal_float64(count, num_rows):
    rows, reads = _reads(count, num_rows)
    with choosing(**PRODUCTS):
        found, sums = jax.jit(_sums, static_argnums=2)(jnp.asarray(rows), jnp.asarray(reads), num_rows)
    distinct, counts = np.unique(rows, return_counts=True)
    expected = np.zeros((len(found.rows), 3))
    np.add.at(expected, np.searchsorted(distinct, rows), reads.astype(np.float64))
    np.testing.assert_array_equal(found.rows[: len(distinct)], distinct)
    assert (np.diff(found.rows) > 0).all() and (found.rows[len(distinct) :] >= num_rows).all()
    np.testing.assert_array_equal(found.counts[: len(distinct)], counts)
    np.testing.assert_allclose(sums, expected, atol=1e-6 * np.sqrt(count))
    np.testing.assert_array_equal(sums[len(distinct) :], 0)


@pytest.mark.parametrize("count, num_rows", SIZES)
def test_both_ways_find_the_same_rows(count, num_rows):
    rows = jnp.asarray(_reads(count, num_rows)[0])
    plain = sorted_rows(rows, num_rows)
    with choosing(**PRODUCTS):
        found = sorted_rows(rows, num_rows)
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_sums_have_the_same_bits_in_every_run_and_whatever_the_order_of_rows():
    rows, reads = _reads(5000, 40)
    with choosing(**PRODUCTS):
        compute = jax.jit(_sums, static_argnums=2)
        first = np.asarray(compute(jnp.asarray(rows), jnp.asarray(reads), 40)[1])
        for _ in range(5):
            again = np.asarray(compute(jnp.asarray(rows), jnp.asarray(reads), 40)[1])
            np.testing.assert_array_equal(first.view(np.uint32), again.view(np.uint32))
        text = compute.lower(jnp.asarray(rows), jnp.asarray(reads), 40).as_text()
    assert "stablehlo.scatter" not in text


def test_runs_of_a_sorted_array():
    ordered = jnp.asarray([2, 2, 3, 7, 7, 7], jnp.int32)
    padding = jnp.arange(100, 105, dtype=jnp.int32)
    for ways in ({}, PRODUCTS):
        with choosing(**ways):
            found = runs_of(ordered, padding)
        assert found.values.tolist() == [2, 3, 7, 103, 104]
        assert found.counts.tolist() == [2, 1, 3, 0, 0]
        assert found.run_of_entry.tolist() == [0, 0, 1, 2, 2, 2]


def test_counts():
    values = jnp.asarray(np.random.default_rng(0).integers(0, 9, (4, 30)), jnp.int32)
    for ways in ({}, PRODUCTS):
        with choosing(**ways):
            assert counted(values, 11).tolist() == np.bincount(values.ravel(), minlength=11).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [11, 6000])
@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_the_gradient_of_an_embedding(target, size, dtype):
    rng = np.random.default_rng(size)
    table = jnp.asarray(rng.standard_normal((size, 5)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, size + 2, (6, 50)), jnp.int32)  # ids past the end are clipped
    weights = jnp.asarray(rng.standard_normal((6, 50, 5)), dtype)

    def loss(table):
        return (embed(table, tokens).astype(dtype) * weights).sum(dtype=jnp.float32)

    with targeting(target):
        value, gradient = jax.value_and_grad(loss)(table)
        text = jax.jit(jax.grad(loss)).lower(table).as_text()
    clipped = np.minimum(tokens, size - 1).ravel()
    expected = np.zeros((size, 5))
    np.add.at(expected, clipped, np.asarray(weights, np.float64).reshape(-1, 5))
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert np.isfinite(value)
    # A large vocabulary has one scatter of distinct rows, a small one none.
    if target != "cpu":
        assert text.count('"stablehlo.scatter"(') == (1 if size == 6000 else 0)
        assert "unique_indices = true" in text or size == 11
