"""Every native kernel against NumPy, on random shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.kernel_case import RandomDraw, check, normal_with_nan
from tests.support.kernel_cases import CASES
from tests.support.row_cases import update_rows
from ultramem_jax.kernels import calls, native
from ultramem_jax.kernels.rules import RULES
from ultramem_jax.kernels.targets import NAMES

pytestmark = pytest.mark.skipif(not native.status().on, reason=str(native.status()))


class HypothesisDraw:
    def __init__(self, data):
        self._data, self.rng = data, np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def integer(self, low, high):
        return self._data.draw(st.integers(low, high))

    def choice(self, options):
        return self._data.draw(st.sampled_from(options))


def _check(case):
    compute = functools.partial(case.function, **case.options)
    results = jax.tree.leaves(compute(*jax.tree.map(jnp.asarray, case.arrays)))
    check(case, results)


def test_every_kernel_has_cases():
    assert set(CASES) == set(NAMES)


@pytest.mark.parametrize("name", CASES)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # to shrink a failure takes minutes; its draws are printed
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_a_kernel_computes_what_numpy_does(name, data):
    _check(CASES[name](HypothesisDraw(data)))


def test_as_many_keys_are_chosen_as_are_said_to_be_served():
    most = calls._MOST_SELECTED
    queries, keys = np.ones((1, 2, 1, 1, 1), np.float32), np.ones((2, 1, 1, most + 1, 1), np.float32)
    keys[..., 0] = np.arange(most + 1)
    assert calls.serves_best_keys(queries, keys, most) and not calls.serves_best_keys(queries, keys, most + 1)
    chosen = calls.best_keys(jnp.asarray(queries), jnp.asarray(keys), jnp.ones((2, 1, 1), jnp.float32), most)
    np.testing.assert_array_equal(chosen[0], np.broadcast_to(np.arange(most, 0, -1), (2, 1, most)))


@pytest.mark.parametrize("rule", RULES)
def test_a_nan_in_a_gradient_is_one_in_the_row(rule):
    for seed in range(5):
        _check(update_rows(RandomDraw(seed), [rule], normal_with_nan))


@pytest.mark.parametrize("slot", [-1, 9])
def test_a_slot_out_of_range_is_an_error(slot):
    slots = jnp.asarray([0, 3, slot, 3], jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"rows_read: a slot is not in \[0, num_slots\)"):
        jax.block_until_ready(calls.rows_read(slots, 9))
