import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ultramem_jax.ops.rounding import stochastic_round

_bfloat16 = ml_dtypes.bfloat16
_round = jax.jit(stochastic_round)
_STEP = 2.0**-7  # from 1 to the next bfloat16


@jax.jit
def _round_by_seeds(x, rows, seeds):
    return jax.vmap(stochastic_round, (None, None, 0))(x, rows, seeds).astype(jnp.float32)


def _rows(count):
    return jnp.arange(count, dtype=jnp.int32)


def _neighbours(x):
    """The largest bfloat16 that is at most x and the smallest that is at least x, as float32."""
    nearest = x.astype(_bfloat16)
    wide = nearest.astype(np.float32)
    below = np.where(wide > x, np.nextafter(nearest, _bfloat16(-np.inf)), nearest)
    above = np.where(wide < x, np.nextafter(nearest, _bfloat16(np.inf)), nearest)
    return below.astype(np.float32), above.astype(np.float32)


def _between(fraction, shape):
    """Values that lie so far from 1 to the next bfloat16."""
    return jnp.full(shape, 1 + fraction * _STEP, jnp.float32)


def test_results_are_neighbours_of_any_finite_number():
    # Random bits are numbers of all exponents, subnormal ones and those past the largest bfloat16 among them.
    bits = np.random.default_rng(0).integers(0, 2**32, (128, 64), np.uint32)
    bits[0] &= 0x807FFFFF  # subnormal
    bits[1] = (bits[1] | 0x7F7F0000) & 0xFF7FFFFF  # between the largest bfloat16 and infinity
    x = bits.view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(-1.2345))
    below, above = _neighbours(x)
    downs = ups = 0
    for seed in range(3):
        found = _round(jnp.asarray(x), _rows(128), jnp.uint32(seed))
        chex.assert_type(found, jnp.bfloat16)
        found = np.asarray(found).astype(np.float32)
        assert ((found == below) | (found == above)).all()
        downs += (found == below).sum()
        ups += (found == above).sum()
    assert abs(downs - ups) < 5 * np.sqrt(3 * x.size)


def test_exact_numbers_and_what_is_not_finite_stay():
    largest, least = float(ml_dtypes.finfo(_bfloat16).max), 2.0**-133
    exact = [0.0, 1.0, 1 + _STEP, 3.140625, largest, 2.0**-126, 2.0**-130, least, np.inf]
    x = np.array([exact, np.negative(exact)], np.float32)
    expected = x.astype(_bfloat16).view(np.uint16)  # bits: they tell 0 from -0
    for seed in range(50):
        found = np.asarray(_round(jnp.asarray(x), _rows(2), jnp.uint32(seed)))
        chex.assert_trees_all_equal(found.view(np.uint16), expected)


def test_nan_stays_nan_whatever_its_bits():
    bits = np.array([[0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF]], np.uint32)
    for seed in range(50):
        assert jnp.isnan(_round(jnp.asarray(bits.view(np.float32)), _rows(1), jnp.uint32(seed))).all()


def test_zero_is_never_passed():
    # Less than the least bfloat16: to zero of the same sign or to the least.
    least = 2.0**-133
    x = np.array([[0.25 * least, -0.25 * least]] * 64, np.float32)
    found = np.asarray(_round(jnp.asarray(x), _rows(64), jnp.uint32(0)).astype(jnp.float32))
    assert set(found[:, 0]) == {0.0, least} and set(found[:, 1]) == {0.0, -least}
    assert not np.signbit(found[:, 0]).any() and np.signbit(found[:, 1]).all()


def test_mean_over_seeds_is_the_number():
    rng = np.random.default_rng(0)
    scale = np.array([1.0, -1.0, 2.0**-90, -(2.0**60), 3.0])[:, None]
    x = (scale * (1 + rng.uniform(size=(5, 4)))).astype(np.float32)
    below, above = (a.astype(np.float64) for a in _neighbours(x))
    found = np.asarray(
        _round_by_seeds(jnp.asarray(x), _rows(5), jnp.arange(4096, dtype=jnp.uint32)), np.float64
    )
    assert ((found == below) | (found == above)).all()
    fraction = (x - below) / (above - below)
    error = (above - below) * np.sqrt(fraction * (1 - fraction) / 4096)
    assert (abs(found.mean(0) - x) < 5 * error).all()


@pytest.mark.parametrize("fraction", [1 / 256, 0.1, 0.25, 0.5, 0.75, 0.9, 255 / 256])
def test_rounds_up_as_often_as_the_fraction_says(fraction):
    x = _between(fraction, (8, 8))
    up = np.asarray(_round_by_seeds(x, _rows(8), jnp.arange(4096, dtype=jnp.uint32))) > 1
    exact = (float(x[0, 0]) - 1) / _STEP
    assert abs(up.mean() - exact) < 5 * np.sqrt(exact * (1 - exact) / up.size)
    # As often in every entry, which has 4096 draws.
    assert (abs(up.mean(0) - exact) < 5 * np.sqrt(exact * (1 - exact) / 4096)).all()


def test_one_seed_rounds_its_array_without_bias():
    up = np.asarray(_round(_between(0.3, (512, 128)), _rows(512), jnp.uint32(3))) > 1
    assert abs(up.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / up.size)
    assert (abs(up.mean(0) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 512)).all()
    assert (abs(up.mean(1) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 128)).all()


def test_the_least_fractions_count_as_well():
    x = jnp.ones((2048, 1024), jnp.float32)
    for least in (np.float32(2.0**-23), np.float32(_STEP - 2.0**-23)):
        up = np.asarray(_round(x + least, _rows(2048), jnp.uint32(0))) > 1
        rarer = min(up.sum(), up.size - up.sum())
        assert abs(rarer - 32) < 5 * np.sqrt(32)  # one in 2¹⁶


def test_seeds_give_different_roundings_and_the_same_seed_the_same():
    x = _between(0.5, (32, 32))
    one, again, other = (np.asarray(_round(x, _rows(32), jnp.uint32(s))) for s in (7, 7, 8))
    chex.assert_trees_all_equal(one, again)
    assert abs((one != other).mean() - 0.5) < 5 * 0.5 / 32


def test_a_row_is_rounded_by_its_name_wherever_it_stands():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((20, 16)), jnp.float32)
    names = jnp.asarray(rng.permutation(1000)[:20], jnp.int32)
    all_rows = _round(x, names, jnp.uint32(5))
    for places in (rng.permutation(20), rng.permutation(20)[:7]):
        chex.assert_trees_all_equal(_round(x[places], names[places], jnp.uint32(5)), all_rows[places])


def test_names_tell_equal_rows_apart():
    x = _between(0.5, (3, 256))
    found = np.asarray(_round(x, jnp.array([4, 2**31 - 1, 4], jnp.int32), jnp.uint32(5)))
    chex.assert_trees_all_equal(found[0], found[2])
    assert abs((found[0] != found[1]).mean() - 0.5) < 5 * 0.5 / 16


def test_columns_rows_and_seeds_are_not_correlated():
    x, count = _between(0.5, (2049, 9)), 2048
    draws = np.asarray(_round_by_seeds(x, _rows(2049), jnp.arange(3, dtype=jnp.uint32))) > 1
    limit = 5 / np.sqrt(count)
    columns = np.corrcoef(draws[0, :count].T) - np.eye(9)
    assert abs(columns).max() < limit
    # Neighbours in seed, row and column, and those of which the one is ahead where the other is behind.
    first = draws[1, :count, :8]
    for seed, row, column in [(1, 1, 0), (1, 1, 1), (2, 0, 0), (2, 1, 0), (0, 1, 0), (2, 0, 1), (0, 0, 1)]:
        second = draws[seed, row : row + count, column : column + 8]
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < limit / np.sqrt(8)


@pytest.mark.parametrize("update", [1e-4, -1e-4])
def test_small_updates_arrive_on_average_where_rounding_to_nearest_loses_them(update):
    def accumulate(rounded):
        def step(value, seed):
            return rounded(value.astype(jnp.float32) + jnp.float32(update), seed), None

        seeds = jnp.arange(1000, dtype=jnp.uint32)
        start = jnp.ones((32, 16), jnp.bfloat16)
        return np.asarray(jax.jit(lambda: jax.lax.scan(step, start, seeds)[0])().astype(jnp.float32))

    nearest = accumulate(lambda value, seed: value.astype(jnp.bfloat16))
    assert (nearest == 1).all()
    found = accumulate(lambda value, seed: stochastic_round(value, _rows(32), seed))
    # In steps of 2⁻⁷ above 1 (2⁻⁸ below), each taken with the probability p: a binomial of 1000 draws.
    step = _STEP if update > 0 else _STEP / 2
    probability = abs(update) / step
    deviation = step * np.sqrt(1000 * probability * (1 - probability))
    assert abs(found.mean() - (1 + 1000 * update)) < 5 * deviation / np.sqrt(found.size)
    assert abs(found.std() / deviation - 1) < 5 / np.sqrt(2 * found.size)  # the steps are independent
