import chex
import jax.numpy as jnp
import numpy as np

from ultramem_jax.ops.sorting import sort_with_order

_SIZES = [  # keys, and how many values they may have
    (1, 1),
    (2, 2),
    (1000, 3),  # many repeats: stability shows
    (1000, 2**22),  # one digit
    (1000, 2**22 + 1),  # a bit more than one digit
    (5000, 2**31),  # two digits, and the largest keys that there are
    (1025, 2**31 - 1),
]


class WithAndWithoutJit(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_equals_a_stable_argsort(self):
        sort = self.variant(sort_with_order, static_argnums=1)
        for count, num_values in _SIZES:
            rng = np.random.default_rng(count)
            keys = rng.integers(0, num_values, count)
            keys[:2] = num_values - 1
            ordered, order = sort(jnp.asarray(keys, jnp.int32), num_values)
            expected = np.argsort(keys, kind="stable")
            chex.assert_trees_all_equal(order, expected)
            chex.assert_trees_all_equal(ordered, keys[expected])
            chex.assert_type([ordered, order], jnp.int32)


def test_more_positions_than_words_have_room_for(monkeypatch):
    monkeypatch.setattr("ultramem_jax.ops.sorting._LEAST_DIGIT_BITS", 25)
    keys = np.random.default_rng(0).integers(0, 50, 300)
    ordered, order = sort_with_order(jnp.asarray(keys, jnp.int32), 50)
    expected = np.argsort(keys, kind="stable")
    chex.assert_trees_all_equal(order, expected)
    chex.assert_trees_all_equal(ordered, keys[expected])
