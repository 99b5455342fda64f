import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import oracle
from tests.support.chunk_values import set_chunk_values
from ultramem_jax.ops import product_keys as pk

_retrieve_product_keys = jax.jit(pk.retrieve_product_keys, static_argnums=2)
_retrieve_tucker = jax.jit(pk.retrieve_tucker, static_argnums=4)


def _cells(retrieved, token, head):
    pairs = zip(retrieved.rows[token, head], retrieved.columns[token, head], strict=True)
    return [(int(i), int(j)) for i, j in pairs]


def _given_scores(rows, columns):
    """Queries and keys of one token and head with these scores, a list for each rank: keys are scores."""
    keys = jnp.array([rows, columns], jnp.float32)[:, None, :, :, None]
    return jnp.ones((1, 2, 1, len(rows), 1)), keys


def _random(seed, tokens, heads, sets, of_each_rank, ranks, num_keys, width=4):
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((tokens, 2, heads, of_each_rank, width))
    keys = rng.standard_normal((2, sets, ranks, num_keys, width))
    return queries.astype(np.float32), keys.astype(np.float32)


def _random_cores(seed, heads, cores, ranks):
    core = np.random.default_rng(seed).uniform(size=(heads, cores, ranks, ranks)).astype(np.float32)
    return core, _directions(core)


def _directions(cores):
    core = jnp.asarray(cores).sum(1)
    zeros = jnp.zeros(core.shape[:2])
    return jnp.stack(pk.leading_singular_vectors(core, zeros, zeros))


def _all_scores(queries, keys):
    """Row and column scores (r, K) of every token and head: scores[token][head][side], in float64."""
    tokens, _, heads, of_each_rank, _ = queries.shape
    sets, ranks = keys.shape[1:3]
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    return [
        [
            [
                np.array(
                    [
                        keys[side, head % sets, rank] @ queries[token, side, head, rank % of_each_rank]
                        for rank in range(ranks)
                    ]
                )
                for side in range(2)
            ]
            for head in range(heads)
        ]
        for token in range(tokens)
    ]


def _at(queries, keys, retrieved):
    """Scores (T, H, r, m) of the chosen rows and columns from those of all keys, by plain operations."""
    shape = (*queries.shape[:3], *keys.shape[2:3], queries.shape[4])
    keys = jnp.broadcast_to(keys, (2, queries.shape[2], *keys.shape[2:]))
    scores = jnp.einsum("tahrd,ahrkd->tahrk", jnp.broadcast_to(queries, shape), keys)
    return (
        jnp.take_along_axis(scores[:, 0], retrieved.rows[:, :, None], -1),
        jnp.take_along_axis(scores[:, 1], retrieved.columns[:, :, None], -1),
    )


def test_three_by_three_keys_by_hand():
    # Rows score 5, 1, 3 and columns 0, 4, 2. The sums are
    #        c0 c1 c2
    #   r0    5  9  7
    #   r1    1  5  3
    #   r2    3  7  5   and, with row 0 raised by 0.5, the order is r0c1 9.5, r0c2 7.5, r2c1 7.
    found = _retrieve_product_keys(*_given_scores([[5.5, 1.0, 3.0]], [[0.0, 4.0, 2.0]]), 3)
    assert _cells(found, 0, 0) == [(0, 1), (0, 2), (2, 1)]
    chex.assert_trees_all_equal(found.scores[0, 0, :, 0], np.array([9.5, 7.5, 7.0]))
    chex.assert_trees_all_equal(found.candidates[0, :, 0], np.array([[0, 2, 1], [1, 2, 0]]))


def test_three_by_three_tucker_by_hand():
    # One rank, core [[2]]: the grid is 2·row·column. Rows 3, 1, 2 and columns 1, 0.5, 4 give
    #        c0  c1  c2
    #   r0    6   3  24
    #   r1    2   1   8
    #   r2    4   2  16
    cores = jnp.array([[[[2.0]]]])
    scores = _given_scores([[3.0, 1.0, 2.0]], [[1.0, 0.5, 4.0]])
    found = _retrieve_tucker(*scores, cores, jnp.ones((2, 1, 1)), 3)
    # Candidates are rows 0, 2, 1 and columns 2, 0, 1: all of them, so the best three of the grid.
    chex.assert_trees_all_equal(found.candidates[0, :, 0], np.array([[0, 2, 1], [2, 0, 1]]))
    assert _cells(found, 0, 0) == [(0, 2), (2, 2), (1, 2)]
    chex.assert_trees_all_equal(found.scores[0, 0, :, 0], np.array([24.0, 16.0, 8.0]))


def test_a_good_cell_outside_the_candidates_is_missed():
    # Two ranks, core diag(2, 1), so that u and t are the first axis: candidates are the best in rank 0. Cell
    # (1, 1) scores 1·9·9 = 81 in rank 1, but row 1 and column 1 are no candidates.
    cores = jnp.array([[[[2.0, 0.0], [0.0, 1.0]]]])
    scores = _given_scores([[3.0, 0.0], [0.0, 9.0]], [[4.0, 0.0], [0.0, 9.0]])
    found = _retrieve_tucker(*scores, cores, jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]]), 1)
    assert _cells(found, 0, 0) == [(0, 0)]
    chex.assert_trees_all_equal(found.scores[0, 0], np.array([[24.0]]))


@pytest.mark.parametrize("num_keys, top_m, sets", [(3, 3, 2), (16, 5, 2), (16, 5, 1), (33, 33, 2)])
def test_product_keys_equal_brute_force_over_the_whole_grid(num_keys, top_m, sets):
    queries, keys = _random(num_keys, 6, 2, sets, 1, 1, num_keys)
    found = _retrieve_product_keys(jnp.asarray(queries), jnp.asarray(keys), top_m)
    for token, heads in enumerate(_all_scores(queries, keys)):
        for head, (row, column) in enumerate(heads):
            expected = oracle.product_key_cells(row[0], column[0], top_m)
            assert _cells(found, token, head) == expected
            sums = np.array([row[0, i] + column[0, j] for i, j in expected])
            chex.assert_trees_all_close(found.scores[token, head, :, 0], sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "ranks, cores, of_each_rank, sets",
    [(1, 1, 1, 2), (2, 1, 2, 2), (2, 2, 2, 2), (3, 4, 3, 2), (3, 2, 1, 2), (2, 2, 2, 1), (2, 2, 1, 1)],
)
def test_tucker_equals_brute_force_over_its_candidates(ranks, cores, of_each_rank, sets):
    queries, keys = _random(ranks, 5, 2, sets, of_each_rank, ranks, 20)
    core, directions = _random_cores(ranks, 2, cores, ranks)
    found = _retrieve_tucker(jnp.asarray(queries), jnp.asarray(keys), jnp.asarray(core), directions, 6)
    core, (u, t) = core.astype(np.float64), np.asarray(directions, np.float64)
    for token, heads in enumerate(_all_scores(queries, keys)):
        for head, (row, column) in enumerate(heads):
            candidates = [oracle.best(u[head] @ row, 6), oracle.best(t[head] @ column, 6)]
            chex.assert_trees_all_equal(found.candidates[token, :, head], np.stack(candidates))
            expected = oracle.tucker_cells(row, column, core[head].sum(0), u[head], t[head], 6)
            assert _cells(found, token, head) == expected
            scores = np.array([[row[:, i] @ c @ column[:, j] for c in core[head]] for i, j in expected])
            chex.assert_trees_all_close(found.scores[token, head], scores, rtol=1e-5, atol=1e-5)


def test_rank_one_tucker_with_positive_scores_is_exact_over_the_whole_grid():
    rng = np.random.default_rng(7)
    queries = rng.uniform(0.1, 1.0, (8, 2, 1, 1, 3)).astype(np.float32)
    keys = rng.uniform(0.1, 1.0, (2, 1, 1, 24, 3)).astype(np.float32)
    ones = jnp.ones((1, 1, 1, 1)), jnp.ones((2, 1, 1))
    found = _retrieve_tucker(jnp.asarray(queries), jnp.asarray(keys), *ones, 7)
    for token, ((row, column),) in enumerate(_all_scores(queries, keys)):
        grid = row[0][:, None] * column[0]
        assert _cells(found, token, 0) == [divmod(int(c), 24) for c in oracle.best(grid.ravel(), 7)]


def test_selection_follows_the_sum_of_the_cores():
    # Core 1 by itself prefers cell (0, 0), core 2 prefers (1, 1) by more: the sum has to prefer (1, 1).
    scores = _given_scores([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])  # key i scores in rank i
    cores = jnp.array([[[[2.0, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 3.0]]]])
    # The sum is diag(2, 3.5): its leading vector is the second axis, up to the sign, which is set here.
    directions = abs(_directions(cores))
    chex.assert_trees_all_close(directions[:, 0], np.array([[0, 1], [0, 1]]), rtol=1e-7, atol=1e-6)
    found = _retrieve_tucker(*scores, cores, directions, 1)
    assert _cells(found, 0, 0) == [(1, 1)]
    chex.assert_trees_all_close(found.scores[0, 0, 0], np.array([0.5, 3.0]), rtol=1e-7)


def test_equal_cores_equal_one_core():
    args = [jnp.asarray(a) for a in _random(3, 5, 2, 2, 2, 2, 20)]
    core, directions = _random_cores(3, 2, 1, 2)
    one = _retrieve_tucker(*args, jnp.asarray(core), directions, 6)
    four = _retrieve_tucker(*args, jnp.repeat(jnp.asarray(core), 4, 1), directions, 6)
    chex.assert_trees_all_equal(one.rows, four.rows)
    chex.assert_trees_all_equal(one.columns, four.columns)
    chex.assert_trees_all_close(jnp.repeat(one.scores, 4, -1), four.scores, rtol=1e-6)


def _gradients(retrieve, weight, *args):
    """Returns the gradients of Σ weight · scores by all arguments, and what was retrieved."""

    def total(*args):
        found = retrieve(*args)
        return (found.scores * weight).sum(), found

    return jax.jit(jax.grad(total, tuple(range(len(args))), has_aux=True))(*args)


@pytest.mark.parametrize("sets", [1, 2])
def test_product_key_gradients_equal_those_of_all_scores(sets):
    args = [jnp.asarray(a) for a in _random(4, 3, 2, sets, 1, 1, 9)]
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 4, 1)), jnp.float32)
    gradients, found = _gradients(lambda *a: pk.retrieve_product_keys(*a, 4), weight, *args)

    def dense(queries, keys):
        row, column = _at(queries, keys, found)
        return ((row + column)[:, :, 0] * weight[..., 0]).sum()

    chex.assert_trees_all_close(gradients, jax.jit(jax.grad(dense, (0, 1)))(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_each_rank, sets", [(2, 2), (1, 2), (2, 1)])
def test_tucker_gradients_equal_those_of_all_scores(of_each_rank, sets):
    queries, keys = (jnp.asarray(a) for a in _random(5, 3, 2, sets, of_each_rank, 2, 8))
    core, directions = _random_cores(5, 2, 2, 2)
    args = queries, keys, jnp.asarray(core)
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 3, 2)), jnp.float32)
    (*gradients, by_directions), found = _gradients(
        lambda *a: pk.retrieve_tucker(*a, 3), weight, *args, directions
    )
    assert not by_directions.any()

    def dense(queries, keys, cores):
        row, column = _at(queries, keys, found)
        return (jnp.einsum("thqm,hcqs,thsm->thmc", row, cores, column) * weight).sum()

    expected = jax.jit(jax.grad(dense, (0, 1, 2)))(*args)
    chex.assert_trees_all_close(tuple(gradients), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [0, 2])
def test_gradients_reach_only_the_keys_of_chosen_cells(ranks):
    args = [jnp.asarray(a) for a in _random(6, 1, 1, 1, max(ranks, 1), max(ranks, 1), 8)]
    core, directions = _random_cores(6, 1, 2, 2)

    def retrieve(queries, keys):
        if ranks:
            return pk.retrieve_tucker(queries, keys, jnp.asarray(core), directions, 4)
        return pk.retrieve_product_keys(queries, keys, 4)

    (_, by_keys), found = _gradients(retrieve, jnp.float32(1), *args)
    reached = np.asarray(by_keys).any((1, 2, 4))  # (2, K)
    for side, chosen in enumerate((found.rows, found.columns)):
        chex.assert_trees_all_equal(np.flatnonzero(reached[side]), np.unique(chosen))
    # Of the four candidates of each side, too, those that were not chosen get nothing; there are some.
    assert reached.sum() < 2 * 4


def test_chunks_of_tokens_find_the_same(monkeypatch):
    queries, keys = (jnp.asarray(a) for a in _random(8, 7, 2, 2, 2, 2, 9))
    core, directions = _random_cores(8, 2, 2, 2)
    core = jnp.asarray(core)

    def both(queries, keys):
        return (
            pk.retrieve_product_keys(queries[:, :, :, :1], keys[:, :, :1], 3),
            pk.retrieve_tucker(queries, keys, core, directions, 3),
        )

    whole = jax.jit(lambda *a: both(*a))(queries, keys)
    # Three tokens at a time while all keys are scored, one or two while candidates are, six by the grids.
    set_chunk_values(monkeypatch, 3 * 2 * 2 * 9)
    chunked = jax.jit(lambda *a: both(*a))(queries, keys)
    chex.assert_trees_all_close(whole, chunked, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_scored_in_float32():
    queries, keys = (jnp.asarray(a, jnp.bfloat16) for a in _random(9, 3, 2, 2, 2, 2, 12))
    core, directions = _random_cores(9, 2, 2, 2)
    found = _retrieve_tucker(queries, keys, jnp.asarray(core), directions, 4)
    row, column = _at(queries.astype(jnp.float32), keys.astype(jnp.float32), found)
    chex.assert_type(found.scores, jnp.float32)
    chex.assert_type([found.rows, found.columns], jnp.int32)
    expected = np.einsum("thqm,hcqs,thsm->thmc", *(np.asarray(a, np.float64) for a in (row, core, column)))
    chex.assert_trees_all_close(found.scores, expected, rtol=1e-5, atol=1e-5)
    assert (np.diff(expected.sum(-1), axis=-1) <= 0).all()  # best first


def test_singular_vectors_keep_their_sign():
    rng = np.random.default_rng(0)
    core = rng.uniform(size=(2, 3, 3)).astype(np.float32)
    zeros = jnp.zeros((2, 3))
    u, t = pk.leading_singular_vectors(jnp.asarray(core), zeros, zeros)
    left, _, right = np.linalg.svd(core)
    chex.assert_trees_all_close(abs(u), abs(left[:, :, 0]), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(abs(t), abs(right[:, 0]), rtol=1e-4, atol=1e-6)
    again = jax.jit(pk.leading_singular_vectors)
    for sign in (1.0, -1.0):
        for _ in range(20):
            moved = core + 0.05 * rng.standard_normal(core.shape).astype(np.float32)
            again_u, again_t = again(jnp.asarray(moved), sign * u, sign * t)
            assert ((again_u * sign * u).sum(-1) > 0).all() and ((again_t * sign * t).sum(-1) > 0).all()


def test_core_loss_by_hand_and_its_gradient():
    # diag(3, 1.15): λ₂ - τ = 1, so the loss is 1, and its gradient at C₂₂ is 2.
    cores = jnp.array([[[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.15]]]])
    loss, grad = jax.value_and_grad(pk.core_loss)(cores, 0.15)
    chex.assert_trees_all_close(loss, 1.0, rtol=1e-6)
    chex.assert_trees_all_close(
        grad, np.broadcast_to([[0.0, 0.0], [0.0, 2.0]], (1, 2, 2, 2)), rtol=1e-7, atol=1e-6
    )
    assert pk.core_loss(cores * jnp.float32(0.1), 0.15) == 0  # λ₂ = 0.115 is below τ
    assert pk.core_loss(jnp.ones((1, 1, 1, 1)), 0.15) == 0  # r = 1 has no minor values


def test_balance_loss_by_hand():
    # Two tokens and two keys; key 0 is the candidate of both tokens, f = (1, 0). Odds of 3:1 for key 0 and
    # then for key 1 are p = (1/2, 1/2) and a loss of 1, twice for key 0 p = (3/4, 1/4) and a loss of 1.5.
    log3 = np.log(3.0)
    both = jnp.zeros((2, 1, 1), jnp.int32)
    chex.assert_trees_all_close(
        pk.balance_loss(jnp.array([[[log3, 0.0], [0.0, log3]]]), both), 1.0, rtol=1e-6
    )
    chex.assert_trees_all_close(
        pk.balance_loss(jnp.array([[[log3, 0.0], [log3, 0.0]]]), both), 1.5, rtol=1e-6
    )


def _balance_loss(scores, candidates):
    heads, tokens, num_keys = scores.shape
    f, p = np.zeros(num_keys), np.zeros(num_keys)
    for head in range(heads):
        for token in range(tokens):
            p += oracle.softmax(scores[head, token]) / (heads * tokens)
            for key in candidates[token, head]:
                f[key] += 1 / candidates.size
    return num_keys * f @ p


def test_balance_loss_and_its_gradient_equal_their_definition():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, 3, 4)).astype(np.float32).astype(np.float64)
    candidates = np.argsort(-scores.swapaxes(0, 1), -1)[..., :2]
    loss, gradient = jax.jit(jax.value_and_grad(pk.balance_loss))(
        jnp.asarray(scores, jnp.float32), jnp.asarray(candidates, jnp.int32)
    )
    chex.assert_trees_all_close(loss, _balance_loss(scores, candidates), rtol=1e-6)
    for entry in np.ndindex(scores.shape):
        step = np.zeros_like(scores)
        step[entry] = 1e-4
        slope = _balance_loss(scores + step, candidates) - _balance_loss(scores - step, candidates)
        chex.assert_trees_all_close(gradient[entry], slope / 2e-4, rtol=1e-5, atol=1e-6)
