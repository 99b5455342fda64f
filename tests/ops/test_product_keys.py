import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from ultramem_jax.ops import product_keys as pk


def _cells(retrieved, head, token):
    pairs = zip(retrieved.rows[head, token], retrieved.columns[head, token], strict=True)
    return [(int(i), int(j)) for i, j in pairs]


def test_three_by_three_keys_by_hand():
    # Rows score 5, 1, 3 and columns 0, 4, 2. The sums are
    #        c0 c1 c2
    #   r0    5  9  7
    #   r1    1  5  3
    #   r2    3  7  5   and, with row 0 raised by 0.5, the order is r0c1 9.5, r0c2 7.5, r2c1 7.
    row, column = jnp.array([[[5.5, 1.0, 3.0]]]), jnp.array([[[0.0, 4.0, 2.0]]])
    found = pk.retrieve_product_keys(row, column, 3)
    assert _cells(found, 0, 0) == [(0, 1), (0, 2), (2, 1)]
    np.testing.assert_array_equal(found.scores[0, 0, :, 0], [9.5, 7.5, 7.0])


def test_three_by_three_tucker_by_hand():
    # One rank, core [[2]]: the grid is 2·row·column. Rows 3, 1, 2 and columns 1, 0.5, 4 give
    #        c0  c1  c2
    #   r0    6   3  24
    #   r1    2   1   8
    #   r2    4   2  16
    row, column = jnp.array([[[[3.0, 1.0, 2.0]]]]), jnp.array([[[[1.0, 0.5, 4.0]]]])
    cores = jnp.array([[[[2.0]]]])
    one = jnp.ones((1, 1))
    found = pk.retrieve_tucker(row, column, cores, one, one, 3)
    # Candidates are rows 0, 2, 1 and columns 2, 0, 1: all of them, so the best three of the grid.
    assert _cells(found, 0, 0) == [(0, 2), (2, 2), (1, 2)]
    np.testing.assert_array_equal(found.scores[0, 0, :, 0], [24.0, 16.0, 8.0])


@pytest.mark.parametrize("num_keys, top_m", [(3, 3), (16, 5), (33, 33)])
def test_product_keys_equal_brute_force_over_the_whole_grid(num_keys, top_m):
    rng = np.random.default_rng(num_keys)
    row, column = rng.standard_normal((2, 2, 6, num_keys)).astype(np.float32)
    found = pk.retrieve_product_keys(jnp.asarray(row), jnp.asarray(column), top_m)
    for head in range(2):
        for token in range(6):
            expected = oracle.product_key_cells(row[head, token], column[head, token], top_m)
            assert _cells(found, head, token) == expected
            sums = [row[head, token, i] + column[head, token, j] for i, j in expected]
            np.testing.assert_array_equal(found.scores[head, token, :, 0], np.array(sums))


def _random_tucker(seed, heads, cores, rank, tokens, keys):
    rng = np.random.default_rng(seed)
    row, column = rng.standard_normal((2, heads, rank, tokens, keys)).astype(np.float32)
    core = rng.uniform(size=(heads, cores, rank, rank)).astype(np.float32)
    zeros = jnp.zeros((heads, rank))
    u, t = pk.leading_singular_vectors(jnp.asarray(core).sum(1), zeros, zeros)
    return row, column, core, u, t


@pytest.mark.parametrize("rank, cores", [(1, 1), (2, 1), (2, 2), (3, 4)])
def test_tucker_equals_brute_force_over_its_candidates(rank, cores):
    row, column, core, u, t = _random_tucker(rank, 2, cores, rank, 5, 20)
    found = pk.retrieve_tucker(jnp.asarray(row), jnp.asarray(column), jnp.asarray(core), u, t, 6)
    row, column, core = (a.astype(np.float64) for a in (row, column, core))
    for head in range(2):
        for token in range(5):
            s_row, s_column = row[head, :, token], column[head, :, token]
            expected = oracle.tucker_cells(
                s_row, s_column, core[head].sum(0), np.asarray(u)[head], np.asarray(t)[head], 6
            )
            assert _cells(found, head, token) == expected
            scores = [[s_row[:, i] @ c @ s_column[:, j] for c in core[head]] for i, j in expected]
            np.testing.assert_allclose(found.scores[head, token], scores, rtol=2e-6, atol=2e-6)


def test_rank_one_tucker_with_positive_scores_is_exact_over_the_whole_grid():
    rng = np.random.default_rng(7)
    row, column = rng.uniform(0.1, 1.0, (2, 1, 1, 8, 24)).astype(np.float32)
    one = jnp.ones((1, 1))
    found = pk.retrieve_tucker(jnp.asarray(row), jnp.asarray(column), one[:, None, None], one, one, 7)
    for token in range(8):
        grid = row[0, 0, token].astype(np.float64)[:, None] * column[0, 0, token]
        assert _cells(found, 0, token) == [divmod(int(c), 24) for c in oracle.best(grid.ravel(), 7)]


def test_selection_follows_the_sum_of_the_cores():
    # Core 1 alone prefers cell (0, 0), core 2 alone (1, 1) by more: the sum has to prefer (1, 1).
    row = column = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # (1, 2, 1, 2): key i scores in rank i
    cores = jnp.array([[[[2.0, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 3.0]]]])
    zeros = jnp.zeros((1, 2))
    u, t = pk.leading_singular_vectors(cores.sum(1), zeros, zeros)
    # The sum is diag(2, 3.5): its leading vector is the second axis, up to the sign, which is set here.
    u, t = abs(u), abs(t)
    found = pk.retrieve_tucker(row, column, cores, u, t, 1)
    assert _cells(found, 0, 0) == [(1, 1)]
    np.testing.assert_allclose(found.scores[0, 0, 0], [0.5, 3.0])


def test_equal_cores_equal_one_core():
    row, column, core, u, t = _random_tucker(3, 2, 1, 2, 5, 20)
    args = jnp.asarray(row), jnp.asarray(column)
    one = pk.retrieve_tucker(*args, jnp.asarray(core), u, t, 6)
    four = pk.retrieve_tucker(*args, jnp.repeat(jnp.asarray(core), 4, 1), u, t, 6)
    np.testing.assert_array_equal(one.rows, four.rows)
    np.testing.assert_array_equal(one.columns, four.columns)
    np.testing.assert_allclose(jnp.repeat(one.scores, 4, -1), four.scores, rtol=1e-6)


def test_gradients_reach_the_chosen_scores_and_the_cores_alone():
    row, column, core, u, t = _random_tucker(5, 1, 2, 2, 2, 8)
    weight = np.random.default_rng(0).standard_normal((1, 2, 3, 2)).astype(np.float32)

    def total(row, column, core, u, t):
        return (pk.retrieve_tucker(row, column, core, u, t, 3).scores * weight).sum()

    args = [jnp.asarray(a) for a in (row, column, core, u, t)]
    grads = jax.grad(total, argnums=(0, 1, 2, 3, 4))(*args)
    assert not grads[3].any() and not grads[4].any()
    found = pk.retrieve_tucker(*args, 3)
    expected_row, expected_core = np.zeros_like(row), np.zeros_like(core)
    for token in range(2):
        for j, (i, k) in enumerate(_cells(found, 0, token)):
            for c in range(2):
                w = weight[0, token, j, c]
                expected_row[0, :, token, i] += w * core[0, c] @ column[0, :, token, k]
                expected_core[0, c] += w * np.outer(row[0, :, token, i], column[0, :, token, k])
    np.testing.assert_allclose(grads[0], expected_row, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads[2], expected_core, rtol=1e-5, atol=1e-6)


def test_singular_vectors_keep_their_sign():
    rng = np.random.default_rng(0)
    core = rng.uniform(size=(2, 3, 3)).astype(np.float32)
    zeros = jnp.zeros((2, 3))
    u, t = pk.leading_singular_vectors(jnp.asarray(core), zeros, zeros)
    left, _, right = np.linalg.svd(core)
    np.testing.assert_allclose(abs(u), abs(left[:, :, 0]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(abs(t), abs(right[:, 0]), rtol=1e-4, atol=1e-6)
    for sign in (1.0, -1.0):
        for _ in range(20):
            moved = core + 0.05 * rng.standard_normal(core.shape).astype(np.float32)
            again_u, again_t = pk.leading_singular_vectors(jnp.asarray(moved), sign * u, sign * t)
            assert ((again_u * sign * u).sum(-1) > 0).all() and ((again_t * sign * t).sum(-1) > 0).all()


def test_core_loss_by_hand_and_its_gradient():
    # diag(3, 1.15): λ₂ - τ = 1, so the loss is 1, and its gradient at C₂₂ is 2.
    cores = jnp.array([[[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.15]]]])
    loss, grad = jax.value_and_grad(pk.core_loss)(cores, 0.15)
    np.testing.assert_allclose(loss, 1.0, rtol=1e-6)
    np.testing.assert_allclose(grad, np.broadcast_to([[0.0, 0.0], [0.0, 2.0]], (1, 2, 2, 2)), atol=1e-6)
    assert pk.core_loss(cores * jnp.float32(0.1), 0.15) == 0  # λ₂ = 0.115 is below τ
    assert pk.core_loss(jnp.ones((1, 1, 1, 1)), 0.15) == 0  # r = 1 has no minor values
