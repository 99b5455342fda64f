import chex
import jax.numpy as jnp
import numpy as np

from ultramem_jax.ops import addressing


def _grid(keys):
    rows, columns = np.divmod(np.arange(keys * keys), keys)
    return jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32)


class InEveryVariant(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_every_block_and_slot_is_reached_from_exactly_one_cell(self):
        in_order = self.variant(addressing.block_and_slot, static_argnums=(2, 3))
        shuffled = self.variant(addressing.shuffled_block_and_slot, static_argnums=(2, 3, 4))
        for num_keys, expansion in [(1, 1), (5, 1), (7, 4), (12, 9), (13, 16), (64, 4)]:
            grid = _grid(num_keys * int(np.sqrt(expansion)))
            for blocks, slots in (
                in_order(*grid, num_keys, expansion),
                *(shuffled(*grid, num_keys, expansion, seed) for seed in (0, 123)),
            ):
                address = np.asarray(blocks) * num_keys**2 + np.asarray(slots)
                chex.assert_trees_all_equal(np.sort(address), np.arange(expansion * num_keys**2))


def test_shuffle_leaves_no_order():
    # Neighbouring cells land in blocks and slots as if drawn at random.
    rows, columns = _grid(200)
    blocks, slots = (
        np.asarray(a, np.float64) for a in addressing.shuffled_block_and_slot(rows, columns, 100, 4, 1)
    )
    for landed in (blocks, slots):
        assert abs(np.corrcoef(landed[:-1], landed[1:])[0, 1]) < 0.02  # 40,000 pairs: 4 standard errors
        assert abs(np.corrcoef(landed[:-200], landed[200:])[0, 1]) < 0.02


def test_seeds_give_different_shuffles_and_the_same_seed_the_same():
    grid = _grid(40)
    one, again, other = (np.asarray(addressing.keyed_shuffle(*grid, 40, s)) for s in (1, 1, 2))
    chex.assert_trees_all_equal(one, again)
    assert (one != other).any(0).mean() > 0.99


def test_stored_permutation_by_hand():
    # K = 2, N = 2, E = 2: cells 0..3 go to addresses 2, 0, 3, 1: (block, slot) 1,0 and 0,0 and 1,1 and 0,1.
    rows, columns = _grid(2)
    permutation = jnp.array([2, 0, 3, 1], jnp.int32)
    blocks, slots = addressing.permuted_block_and_slot(rows, columns, 2, 2, permutation)
    assert blocks.tolist() == [1, 0, 1, 0] and slots.tolist() == [0, 0, 1, 1]


def test_unshuffled_single_block_is_row_major():
    rows, columns = _grid(6)
    blocks, slots = addressing.block_and_slot(rows, columns, 6, 1)
    assert not blocks.any()
    chex.assert_trees_all_equal(slots, np.arange(36))
