"""Selection by ranks: the order of `jax.lax.top_k` to the bit, on every platform's way of taking entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.algorithms import choosing
from ultramem_jax.ops.selection import largest, pick, pick_with_gradient, put
from ultramem_jax.ops.topk import take_along_last, top_k
from ultramem_jax.platforms import targeting

PICKS = ("gather", "compare")
# Rows that are ranked at once, and those that are cut into tiles once, twice and three times.
SIZES = [(5, 5), (64, 3), (256, 16), (640, 16), (1764, 42), (2200, 42), (1000, 1), (130, 32), (8192, 32)]


def _rows(length):
    """Normal rows, and rows of ties, NaN of both signs, infinities, zeros of both signs and subnormals."""
    rng = np.random.default_rng(length)
    x = rng.standard_normal((12, length)).astype(np.float32)
    x[2:4] = np.round(x[2:4])
    x[4] = 0
    x[5, ::3] = np.nan
    x[6, ::2] = -0.0
    x[7] = -np.inf
    x[8, ::5] = np.copysign(np.nan, -1)
    x[9] *= 1e-40
    x[10] = np.where(rng.random(length) < 0.5, 0.0, -0.0)
    x[11, 1:] = np.inf
    return x


def _by_ranks(x, k):
    return np.asarray(jax.jit(lambda x: largest(x.T, k).T)(jnp.asarray(x)))


@pytest.mark.parametrize("picks", PICKS)
@pytest.mark.parametrize("length, k", SIZES)
def test_the_order_is_that_of_lax_top_k(length, k, picks):
    x = _rows(length)
    with choosing(picks=picks):
        found = _by_ranks(x, k)
    np.testing.assert_array_equal(found, jax.lax.top_k(jnp.asarray(x), k)[1])


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int8, jnp.bfloat16, np.float16])
def test_other_dtypes(dtype):
    x = np.array(jnp.asarray(np.random.default_rng(0).integers(-90, 90, (7, 300)), dtype))
    if np.dtype(dtype) == np.int32:
        x[0, :4] = 2**31 - 1, -(2**31), -(2**31) + 1, 0
    if np.dtype(dtype) == np.uint32:
        x[0, :4] = 2**32 - 1, 2**31, 2**31 - 1, 0
    np.testing.assert_array_equal(_by_ranks(x, 9), jax.lax.top_k(jnp.asarray(x), 9)[1])


def test_none_of_a_row():
    for target in ("cpu", "gpu", "tpu"):
        with targeting(target):
            values, index = top_k(jnp.ones((3, 5)), 0)
        assert values.shape == index.shape == (3, 0)


def test_leading_axes_are_rows_of_their_own():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 70, 5)), jnp.float32)
    expected = jax.lax.top_k(jnp.moveaxis(x, -2, -1), 6)[1]
    np.testing.assert_array_equal(jnp.moveaxis(largest(x, 6), -2, -1), expected)


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_top_k_on_accelerators(target):
    x = jnp.asarray(_rows(640).reshape(3, 4, 640))
    expected = jax.lax.top_k(x, 16)
    cotangent = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, 16)), jnp.float32)
    finite = jnp.asarray(np.random.default_rng(3).standard_normal((3, 4, 640)), jnp.float32)
    with targeting(target):
        values, index = jax.jit(lambda x: top_k(x, 16))(x)
        gradient = jax.grad(lambda x: (top_k(x, 16)[0] * cotangent).sum())(finite)
        text = jax.jit(jax.grad(lambda x: (top_k(x, 16)[0] * cotangent).sum())).lower(finite).as_text()
    np.testing.assert_array_equal(index, expected[1])
    bits = [np.asarray(x).view(np.uint32) for x in (values, expected[0])]
    np.testing.assert_array_equal(*bits)
    by_scatter = jax.grad(lambda x: (jax.lax.top_k(x, 16)[0] * cotangent).sum())(finite)
    np.testing.assert_array_equal(gradient, by_scatter)
    assert "stablehlo.scatter" not in text and "stablehlo.sort" not in text and "top_k" not in text


@pytest.mark.parametrize("picks", PICKS)
def test_picks_and_puts_are_each_others_inverse(picks):
    rng = np.random.default_rng(4)
    positions = jnp.asarray(np.stack([rng.permutation(9)[:4] for _ in range(2 * 5)], -1).reshape(4, 2, 5))
    positions = jnp.moveaxis(positions, 1, 0).astype(jnp.int32)
    values = jnp.asarray(rng.standard_normal((2, 4, 5)), jnp.float32)
    expected = np.zeros((2, 9, 5), np.float32)
    np.put_along_axis(expected, np.asarray(positions), np.asarray(values), axis=1)
    with choosing(picks=picks):
        full = put(values, positions, 9)
        np.testing.assert_array_equal(full, expected)
        np.testing.assert_array_equal(pick(full, positions), values)
    np.testing.assert_array_equal(pick_with_gradient(full, positions), values)


def test_take_along_last_has_no_scatter_on_accelerators():
    x = jnp.asarray(np.random.default_rng(5).standard_normal((4, 3, 8)), jnp.float32)
    index = jnp.asarray(np.random.default_rng(6).integers(0, 8, (4, 3, 5)), jnp.int32)
    expected = np.take_along_axis(np.asarray(x), np.asarray(index), -1)
    for target in ("cpu", "gpu", "tpu"):
        with targeting(target):
            np.testing.assert_array_equal(take_along_last(x, index), expected)
            lowered = jax.jit(jax.grad(lambda x: take_along_last(x, index).sum())).lower(x).as_text()
            assert ("scatter" in lowered) == (target == "cpu")
