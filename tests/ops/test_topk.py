import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.topk import top_k


def _assert_equal(x, k, block=None):
    found, expected = top_k(jnp.asarray(x), k, block), tuple(jax.lax.top_k(jnp.asarray(x), k))
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_dtypes(found, expected)


def test_by_hand():
    # Blocks of two: maxima 4, 9, 9, 7. The best three blocks are the last three; the values 9, 9, 8 lie at 2,
    # 5 and 3, and of the equal ones the first comes first.
    values, index = top_k(jnp.array([4, 1, 9, 8, 3, 9, 7, 0], jnp.int32), 3, block=2)
    chex.assert_trees_all_equal(values, np.array([9, 9, 8]))
    chex.assert_trees_all_equal(index, np.array([2, 5, 3]))


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


def _zeros_and_subnormals(dtype):
    """Rows (400, 128) of zeros of both signs, subnormals, and from none to many numbers on either side."""
    rng = np.random.default_rng(0)
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    x = rng.integers(-3, 4, (400, 128)) * smallest * rng.choice([-1.0, 1.0], (400, 128))
    x[::4] = np.abs(x[::4])
    x[1::4] = np.copysign(0.0, x[1::4])
    normal = rng.random((400, 128)) < np.linspace(0, 0.2, 400)[:, None]
    x = np.where(normal, rng.integers(-2, 3, (400, 128)), x)
    return jnp.asarray(np.where(rng.random((400, 1)) < 0.2, -np.abs(x), x).astype(dtype))


class WithAndWithoutJit(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_rows_of_zeros_and_subnormals_agree_in_all_normal_numbers(self):
        dtypes = jnp.float32, jnp.bfloat16, jnp.float16
        for dtype, block in itertools.product(dtypes, (2, 4, 16)):
            ours = self.variant(lambda x, block=block: top_k(x, 6, block))
            with self.subTest(dtype=dtype, block=block):
                _assert_agrees_in_all_normal_numbers(ours, dtype)


def _assert_agrees_in_all_normal_numbers(ours, dtype):
    x, k = _zeros_and_subnormals(dtype), 6
    values, index = map(np.asarray, ours(x))
    expected, expected_index = map(np.asarray, jax.lax.top_k(x, k))
    least = float(jnp.finfo(dtype).tiny)
    magnitude = np.abs(expected.astype(np.float32))
    chex.assert_trees_all_equal(values, np.take_along_axis(np.asarray(x), index, -1))
    assert all(len(set(row)) == k for row in index)
    exact = magnitude[:, -1] >= least
    assert 0 < exact.sum() < len(x)
    chex.assert_trees_all_equal(index[exact], expected_index[exact])
    # The other rows: numbers first, and then only zeros and subnormals, in the order of lax.top_k.
    normal = magnitude >= least
    chex.assert_trees_all_equal(index[normal], expected_index[normal])
    assert (np.abs(values.astype(np.float32)[~normal]) < least).all()
    again = np.asarray(jax.lax.top_k(jnp.asarray(values), k)[1])
    chex.assert_trees_all_equal(again, np.broadcast_to(np.arange(k), index.shape))


def test_subnormals_by_hand():
    # The maxima 0, 1e-45 and 4e-45 of three blocks are all zero where subnormals are flushed.
    row = np.array([0.0, 0.0, 1e-45, 0.0, 3e-45, 4e-45, 2.0, -1.0], np.float32)
    values, index = top_k(jnp.asarray(row), 2, block=2)
    assert (values[0], index[0]) == (2, 6)
    assert index[1] in range(6) and np.asarray(values)[1] == row[index[1]]
    _assert_equal(row, 1, 2)  # its last value is a normal number


@pytest.mark.parametrize("length, zeros", [(50, False), (8192, False), (8192, True)])
def test_values_have_the_derivative_of_a_gather(length, zeros):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, length)).astype(np.float32)
    if zeros:
        x[:] = np.where(rng.random(x.shape) < 0.5, np.float32(0), np.float32(-0.0))
        x[:, 5000] = 1
    weights, index = rng.standard_normal((3, 4)).astype(np.float32), np.asarray(top_k(jnp.asarray(x), 4)[1])
    expected = np.zeros_like(x)
    np.put_along_axis(expected, index, weights, axis=1)
    function = jax.jit(lambda x: (weights * top_k(x, 4)[0]).sum())
    chex.assert_trees_all_equal(jax.grad(function)(x), expected)
    direction = rng.standard_normal(x.shape).astype(np.float32)
    of_direction = (expected * direction).sum()
    chex.assert_trees_all_close(jax.jvp(function, (x,), (direction,))[1], of_direction, rtol=1e-5)
