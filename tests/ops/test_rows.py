import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.users_compiler import memory_analysis
from ultramem_jax.memory_spaces import is_on_host
from ultramem_jax.ops.lookup import pooled_lookup, row_products
from ultramem_jax.ops.rows import (
    from_stored,
    put_sorted_rows,
    stored_dtype,
    take_rows,
    take_sorted_rows,
    to_stored,
)
from ultramem_jax.parallel.mesh import one_device
from ultramem_jax.platforms import targeting


def _table(dtype, slots=12, width=6):
    values = np.random.default_rng(0).standard_normal((slots, width)).astype(np.float32)
    return to_stored(jnp.asarray(values), stored_dtype(dtype)), values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_come_out_as_they_went_in(dtype):
    table, values = _table(dtype)
    expected = values.astype(jnp.dtype(dtype))
    chex.assert_type(table, np.uint16 if dtype == "bfloat16" else np.float32)
    chex.assert_trees_all_equal(from_stored(table), expected)
    slots = np.array([[3, 11], [0, 3]])
    for wanted in (jnp.float32, jnp.bfloat16):
        for platform in ("cpu", "gpu", "tpu"):
            with targeting(platform):
                taken = take_rows(table, jnp.asarray(slots), jnp.dtype(wanted))
            chex.assert_trees_all_equal(taken, expected[slots].astype(wanted))
    # Past the end lies the last row.
    chex.assert_trees_all_equal(take_sorted_rows(table, jnp.array([2, 12, 40])), expected[[2, 11, 11]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_past_the_end_are_dropped_and_the_others_replaced(dtype):
    table, _ = _table(dtype)
    rows = jnp.arange(18, dtype=jnp.float32).reshape(3, 6)
    after = put_sorted_rows(table, jnp.array([1, 7, 12]), rows)
    chex.assert_trees_all_equal(from_stored(after)[jnp.array([1, 7])], rows[:2])
    kept = np.setdiff1d(np.arange(12), [1, 7])
    chex.assert_trees_all_equal(after[kept], table[kept])


def test_scattering_words_copies_no_table():
    table = jax.ShapeDtypeStruct((1 << 16, 64), stored_dtype("bfloat16"))
    slots, rows = jax.ShapeDtypeStruct((128,), jnp.int32), jax.ShapeDtypeStruct((128, 64), jnp.float32)
    made = memory_analysis(jax.jit(put_sorted_rows, donate_argnums=0).lower(table, slots, rows))
    assert made.alias_size_in_bytes == 2 * (1 << 16) * 64 and made.temp_size_in_bytes < 1 << 18


@pytest.mark.usefixtures("without_kernels")  # kernels do not serve the host's memory
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_in_the_hosts_memory_gives_the_same_bits(dtype):
    table, _ = _table(dtype)
    sharding = one_device().sharding()
    there = jax.device_put(table, sharding.with_memory_kind("pinned_host"))
    slots, blocks = jnp.array([[3, 11], [0, 3]], jnp.int32), jnp.array([[0, 1], [1, 1]], jnp.int32)
    scores = jnp.arange(8, dtype=jnp.float32).reshape(2, 2, 2)

    def reads(table, scores, vectors):
        pooled = pooled_lookup(table, slots, blocks, scores, 2)
        return (pooled**2).sum() + (row_products(table, slots, vectors) ** 3).sum()

    def update(table):
        return put_sorted_rows(table, jnp.array([1, 12]), jnp.ones((2, 6)))

    gradient = jax.jit(jax.value_and_grad(reads, argnums=(1, 2)))
    vectors = jnp.arange(12, dtype=jnp.float32).reshape(2, 6)
    chex.assert_trees_all_equal(gradient(there, scores, vectors), gradient(table, scores, vectors))
    after = jax.jit(update, donate_argnums=0, out_shardings=there.sharding)(there)
    assert after.sharding.memory_kind == "pinned_host"
    chex.assert_trees_all_equal(after, update(table))


def test_a_function_sees_where_its_table_lies():
    sharding, seen = one_device().sharding(), []
    for kind in ("device", "pinned_host"):
        table = jax.device_put(jnp.ones((4, 2)), sharding.with_memory_kind(kind))
        jax.jit(lambda t: (seen.append(is_on_host(t)), t)[1])(table)
    assert seen == [False, True]
