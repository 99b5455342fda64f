import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.topk import top_k


def _assert_equal(x, k, block=None):
    found, expected = top_k(jnp.asarray(x), k, block), jax.lax.top_k(jnp.asarray(x), k)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_by_hand():
    # Blocks of two: maxima 4, 9, 9, 7. The best three blocks are the last three; the values 9, 9, 8 lie at 2,
    # 5 and 3, and of the equal ones the first comes first.
    values, index = top_k(jnp.array([4, 1, 9, 8, 3, 9, 7, 0], jnp.int32), 3, block=2)
    np.testing.assert_array_equal(values, [9, 9, 8])
    np.testing.assert_array_equal(index, [2, 5, 3])


@pytest.mark.parametrize("length, k, block", [(64, 5, 4), (96, 8, 3), (4096, 32, 16), (4050, 16, None)])
def test_random_rows(length, k, block):
    _assert_equal(np.random.default_rng(0).standard_normal((2, 7, length)).astype(np.float32), k, block)


@pytest.mark.parametrize("distinct", [1, 2, 5, 40])
@pytest.mark.parametrize("block", [2, 4, 8])
def test_ties_within_and_between_blocks(distinct, block):
    x = np.random.default_rng(distinct).integers(0, distinct, (50, 128)).astype(np.float32)
    _assert_equal(x, 6, block)


def test_infinities_are_values_like_any_other():
    x = np.full((3, 64), -np.inf, np.float32)
    x[1, 40], x[2] = np.inf, np.inf
    _assert_equal(x, 4, 4)


@pytest.mark.parametrize(
    "length, k, block",
    [(3, 2, None), (7, 7, None), (4096, 4096, None), (64, 32, 2), (4096, 4096, 8), (4099, 3, None)],
)
def test_short_rows_k_of_the_whole_row_and_lengths_without_divisors(length, k, block):
    _assert_equal(np.random.default_rng(1).standard_normal((2, length)).astype(np.float32), k, block)


def test_bfloat16():
    x = jax.random.normal(jax.random.key(0), (4, 4096), jnp.bfloat16)  # eight bits: many ties
    _assert_equal(x, 32)
