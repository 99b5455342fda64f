import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.chunk_values import set_chunk_values
from ultramem_jax.ops import lookup


def _case(seed, tokens=6, reads=8, slots=10, blocks=4, cores=2, width=6):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((slots, width))
    # Ten slots for 48 reads: they collide within a token, within a block and between blocks.
    return (
        table,
        rng.integers(0, slots, (tokens, reads)).astype(np.int32),
        rng.integers(0, blocks, (tokens, reads)).astype(np.int32),
        rng.standard_normal((tokens, reads, cores)),
        rng.standard_normal((tokens, blocks, width)),
    )


def _float32(*arrays):
    return [jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32) for a in arrays]


def _pooled(table, slots, blocks, scores, expansion):
    """Returns the pooled reads from their definition, in float64."""
    pooled = np.zeros((slots.shape[0], expansion, table.shape[1]))
    slice_width = table.shape[1] // scores.shape[2]
    for t in range(slots.shape[0]):
        for j in range(slots.shape[1]):
            pooled[t, blocks[t, j]] += table[slots[t, j]] * np.repeat(scores[t, j], slice_width)
    return pooled


class WithAndWithoutJit(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_pooled_lookup_equals_its_definition(self):
        table, slots, blocks, scores, _ = _case(0)
        pooled_lookup = self.variant(lookup.pooled_lookup, static_argnums=4)
        found = pooled_lookup(*_float32(table, slots, blocks, scores), 4)
        chex.assert_trees_all_close(found, _pooled(table, slots, blocks, scores, 4), rtol=1e-5, atol=1e-5)


def test_reads_apart_are_what_blocks_of_their_own_give():
    table, slots, _, scores, cotangent = _case(3, reads=4)
    blocks = np.broadcast_to(np.arange(4, dtype=np.int32), slots.shape)

    def of(apart):
        def loss(table, scores):
            pooled = lookup.pooled_lookup(table, *_float32(slots, blocks), scores, 4, apart)
            return (pooled * jnp.asarray(cotangent, jnp.float32)).sum(), pooled

        return jax.grad(loss, (0, 1), has_aux=True)(*_float32(table, scores))

    (gradients, pooled), (expected, same) = of(True), of(False)
    chex.assert_trees_all_close(pooled, _pooled(table, slots, blocks, scores, 4), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(pooled, same, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-5, atol=1e-5)


def test_pooling_before_projecting_equals_reading_the_expanded_table():
    # IVE: Ṽ_p = V·W_p for every block, stacked to E·N rows, read at the virtual address p·N + a.
    table, slots, blocks, scores, _ = _case(1, cores=1)
    projectors = np.random.default_rng(2).standard_normal((4, 6, 5))
    expanded = np.concatenate([table @ w for w in projectors])
    expected = np.einsum("tj,tjd->td", scores[..., 0], expanded[blocks * len(table) + slots])
    pooled = lookup.pooled_lookup(*_float32(table, slots, blocks, scores), 4)
    found = pooled.reshape(6, -1) @ jnp.asarray(projectors.reshape(-1, 5), jnp.float32)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_slots_that_collide_in_one_token_add_up():
    # Slot 3 is read three times by one token: twice in block 0 (2 + 5), once in block 1 (-1).
    table = jnp.arange(10, dtype=jnp.float32)[:, None] + 1
    slots, blocks = jnp.array([[3, 3, 3]]), jnp.array([[0, 0, 1]])
    scores = jnp.array([[[2.0], [5.0], [-1.0]]])
    chex.assert_trees_all_equal(
        lookup.pooled_lookup(table, slots, blocks, scores, 2), np.array([[[28.0], [-4.0]]])
    )


def test_gradients_equal_their_definition():
    table, slots, blocks, scores, cotangent = _case(3)
    args = _float32(table, slots, blocks, scores)
    weight = jnp.asarray(cotangent, jnp.float32)
    d_table, d_scores = jax.grad(
        lambda table, scores: (lookup.pooled_lookup(table, *args[1:3], scores, 4) * weight).sum(), (0, 1)
    )(args[0], args[3])
    expected_table, expected_scores = np.zeros_like(table), np.zeros_like(scores)
    for t in range(6):
        for j in range(8):
            g, value = cotangent[t, blocks[t, j]].reshape(2, 3), table[slots[t, j]].reshape(2, 3)
            expected_scores[t, j] = (g * value).sum(-1)
            expected_table[slots[t, j]] += (g * scores[t, j][:, None]).ravel()
    chex.assert_trees_all_close(d_table, expected_table, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(d_scores, expected_scores, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences():
    table, slots, blocks, scores, cotangent = _case(4)
    with jax.enable_x64(True):
        args = jnp.asarray(table), jnp.asarray(scores)

        def total(table, scores):
            return (lookup.pooled_lookup(table, slots, blocks, scores, 4) * cotangent).sum()

        # A bilinear function has no third derivative: central differences are exact up to round-off.
        rng = np.random.default_rng(0)
        for argument, grad in enumerate(jax.grad(total, (0, 1))(*args)):
            direction = rng.standard_normal(args[argument].shape)
            ahead, behind = (
                [a + step * direction if i == argument else a for i, a in enumerate(args)] for step in (1, -1)
            )
            slope = (total(*ahead) - total(*behind)) / 2
            # The table's gradient is summed in float32.
            chex.assert_trees_all_close((grad * direction).sum(), slope, rtol=1e-6)


@pytest.mark.parametrize("slots_in_table", [10, 1000])
def test_row_gradients_are_the_rows_of_the_dense_gradient(slots_in_table):
    table, slots, blocks, scores, cotangent = _case(5, slots=slots_in_table)
    args = _float32(table, slots, blocks, scores, cotangent)
    dense = jax.grad(lambda table: (lookup.pooled_lookup(table, *args[1:4], 4) * args[4]).sum())(args[0])
    rows = lookup.rows_read(args[1], slots_in_table)
    found = lookup.row_gradients(lookup.GradientsOfReads(rows, args[2], args[3], args[4]))
    read, counts = np.unique(slots, return_counts=True)
    assert found.slots.shape[0] == min(48, slots_in_table)
    chex.assert_trees_all_equal(found.slots[: len(read)], read)
    chex.assert_trees_all_equal(rows.counts[: len(read)], counts)
    chex.assert_trees_all_close(found.values[: len(read)], np.asarray(dense)[read], rtol=1e-5, atol=1e-6)
    # The padding lies past the end of the table, strictly increasing, and holds nothing.
    assert (np.diff(found.slots) > 0).all() and (np.asarray(found.slots[len(read) :]) >= slots_in_table).all()
    assert not found.values[len(read) :].any() and not rows.counts[len(read) :].any()


def test_chunks_change_nothing(monkeypatch):
    table, slots, blocks, scores, cotangent = _case(6, tokens=7)
    args = _float32(table, slots, blocks, scores)
    weight = jnp.asarray(cotangent, jnp.float32)

    def both():
        def total(scores):
            return (lookup.pooled_lookup(*args[:3], scores, 4) * weight).sum()

        return jax.value_and_grad(total)(args[3])

    whole = both()
    set_chunk_values(monkeypatch, 3 * 8 * 6)  # three tokens at a time: 7 = 3 + 3 + 1
    chunked = both()
    chex.assert_trees_all_close(whole[0], chunked[0], rtol=1e-6)
    chex.assert_trees_all_close(whole[1], chunked[1], rtol=1e-6)
