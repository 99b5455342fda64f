import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import oracle
from tests.support.chunk_values import set_chunk_values
from ultramem_jax.ops import key_scores as ks

_LAYOUTS = {  # H, S, q, r
    "a query for every rank": (2, 2, 3, 3),
    "one query of all ranks": (2, 2, 1, 3),
    "common keys": (3, 1, 2, 2),
    "one query and common keys": (3, 1, 1, 2),
    "one rank": (2, 2, 1, 1),
}
_layouts = pytest.mark.parametrize("layout", _LAYOUTS)
_chunks = pytest.mark.parametrize("chunk", [None, 3])  # of seven tokens: 3 + 3 + 1
_T, _K, _D, _M = 7, 6, 4, 3
_BFLOAT16 = 2.0**-8  # the unit roundoff: half the distance from 1 to the next number


def _case(layout, dtype=jnp.float32):
    """Queries, keys and directions."""
    heads, sets, of_each_rank, ranks = _LAYOUTS[layout]
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((_T, 2, heads, of_each_rank, _D))
    keys = rng.standard_normal((2, sets, ranks, _K, _D))
    directions = rng.standard_normal((2, heads, ranks))
    return jnp.asarray(queries, dtype), jnp.asarray(keys, dtype), jnp.asarray(directions, jnp.float32)


def _index(queries):
    """Any keys, the first and the last the same."""
    index = np.random.default_rng(1).integers(0, _K, (*queries.shape[:3], _M))
    index[..., -1] = index[..., 0]
    return jnp.asarray(index, jnp.int32)


def _all_scores(queries, keys):
    """(T, 2, H, r, K) in float64, from the definition."""
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    heads, of_each_rank = queries.shape[2:4]
    sets, ranks = keys.shape[1:3]
    scores = np.zeros((_T, 2, heads, ranks, _K))
    for t, side, head, rank, k in np.ndindex(scores.shape):
        query = queries[t, side, head, rank % of_each_rank]
        scores[t, side, head, rank, k] = query @ keys[side, head % sets, rank, k]
    return scores


def _combined(queries, keys, directions):
    """(2, H, T, K) in float64."""
    return np.einsum("ahr,tahrk->ahtk", np.asarray(directions, np.float64), _all_scores(queries, keys))


def _dense(queries, keys, index):
    """`key_scores` from the scores of all keys, with a derivative that is JAX's."""
    heads, ranks = queries.shape[2], keys.shape[2]
    queries = jnp.broadcast_to(queries, (_T, 2, heads, ranks, _D))
    keys = jnp.broadcast_to(keys, (2, heads, ranks, _K, _D))
    return jnp.take_along_axis(
        jnp.einsum("tahrd,ahrkd->tahrk", queries, keys, precision="highest"), index[:, :, :, None], -1
    )


def _in_chunks(monkeypatch, chunk, values_per_token, function, *args):
    """`function(*args)`, compiled, with `chunk` tokens at a time."""
    if chunk:
        set_chunk_values(monkeypatch, chunk * values_per_token)
    traced = jax.jit(lambda *args: function(*args)).trace(*args)
    assert ("length=2" in str(traced.jaxpr)) == bool(chunk)  # a loop over two whole chunks
    return traced.lower().compile()(*args)


def _pulled_back(scores, queries, keys, index):
    """Scores, and the gradients of queries and keys under a random cotangent."""
    value, pull = jax.vjp(lambda queries, keys: scores(queries, keys, index), queries, keys)
    return value, *pull(_cotangent(value.shape))


def _cotangent(shape):
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)


def _values_per_token(queries, keys):
    return 2 * queries.shape[2] * keys.shape[2] * _M * _D


@_layouts
def test_combined_scores_equal_their_definition(layout):
    case = _case(layout)
    found = jax.jit(ks.combined_scores)(*case)
    chex.assert_trees_all_close(found, _combined(*case), rtol=1e-5, atol=1e-5)


@_layouts
def test_combined_scores_of_bfloat16_are_those_of_factors_rounded_to_it(layout):
    queries, keys, directions = _case(layout, jnp.bfloat16)
    found = jax.jit(ks.combined_scores)(queries, keys, directions)
    chex.assert_type(found, jnp.float32)
    # Every weighted factor is rounded once; a sum over r ranks is rounded up to r times more.
    size = _combined(abs(queries), abs(keys), abs(directions))
    roundings = 1 if queries.shape[3] == keys.shape[2] else 1 + keys.shape[2]
    assert (abs(found - _combined(queries, keys, directions)) <= 1.01 * roundings * _BFLOAT16 * size).all()


@_chunks
@_layouts
def test_best_keys_equal_brute_force(layout, chunk, monkeypatch):
    case = _case(layout)
    found = _in_chunks(
        monkeypatch, chunk, 2 * case[0].shape[2] * _K, lambda *args: ks.best_keys(*args, _M), *case
    )
    chex.assert_type(found, jnp.int32)
    scores = _combined(*case)
    for t, side, head in np.ndindex(found.shape[:3]):
        chex.assert_trees_all_equal(found[t, side, head], oracle.best(scores[side, head, t], _M))


def test_best_keys_carry_no_gradient():
    def scores_at_best(queries, keys, directions):
        best = ks.best_keys(queries, keys, directions, _M)
        return (best.astype(jnp.float32) * jnp.float32(0.5)).sum() + queries.sum()

    by_queries, *others = jax.jit(jax.grad(scores_at_best, (0, 1, 2)))(*_case("common keys"))
    assert (by_queries == 1).all() and not any(gradient.any() for gradient in others)


@_chunks
@_layouts
def test_scores_and_gradients_of_given_keys_equal_those_of_all_scores(layout, chunk, monkeypatch):
    queries, keys, _ = _case(layout)
    index = _index(queries)
    found = _in_chunks(
        monkeypatch,
        chunk,
        _values_per_token(queries, keys),
        lambda *args: _pulled_back(ks.key_scores, *args),
        *(queries, keys, index),
    )
    at_index = np.broadcast_to(np.asarray(index)[:, :, :, None], found[0].shape)
    expected = np.take_along_axis(_all_scores(queries, keys), at_index, -1)
    chex.assert_trees_all_close(found[0], expected, rtol=1e-5, atol=1e-5)
    dense = jax.jit(lambda *args: _pulled_back(_dense, *args))(queries, keys, index)
    chex.assert_trees_all_close(found[1:], dense[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", list(_LAYOUTS)[:3])
def test_bfloat16_is_rounded_where_it_has_to_be(layout, monkeypatch):
    queries, keys, _ = _case(layout, jnp.bfloat16)
    index = _index(queries)
    scores, by_queries, by_keys = _in_chunks(
        monkeypatch,
        3,
        _values_per_token(queries, keys),
        lambda *args: _pulled_back(ks.key_scores, *args),
        *(queries, keys, index),
    )
    chex.assert_type(scores, jnp.float32)
    chex.assert_type([by_queries, by_keys], jnp.bfloat16)

    @jax.jit
    def exact(queries, keys, index):
        cotangent = _cotangent(scores.shape)
        value, pull = jax.vjp(lambda queries, keys: _dense(queries, keys, index), queries, keys)
        absolute = jax.vjp(lambda queries, keys: _dense(queries, keys, index), abs(queries), abs(keys))[1]
        return value, pull(cotangent), absolute(abs(cotangent))

    value, gradients, sizes = exact(queries.astype(jnp.float32), keys.astype(jnp.float32), index)
    # Products of two bfloat16 numbers are exact in float32, so the scores are.
    chex.assert_trees_all_close(scores, value, rtol=1e-5, atol=1e-5)
    # The keys' gradient is summed in float32 and rounded at its end.
    error = abs(by_keys.astype(jnp.float32) - gradients[1])
    assert (error <= _BFLOAT16 * abs(gradients[1]) + 1e-5 * sizes[1]).all()
    # The queries' gradient is so, too, but of cotangents that were rounded.
    error = abs(by_queries.astype(jnp.float32) - gradients[0])
    assert (error <= 1.01 * _BFLOAT16 * (abs(gradients[0]) + sizes[0])).all()


def test_gradients_of_a_key_read_twice_add_up():
    # One token, d = 1: query 2, key 5 is read by both entries, with cotangents 10 and 100.
    queries = jnp.full((1, 2, 1, 1, 1), 2.0)
    keys = jnp.array([[3.0, 5.0], [0.0, 7.0]]).reshape(2, 1, 1, 2, 1)
    index = jnp.ones((1, 2, 1, 2), jnp.int32)

    @jax.jit
    def pulled_back(queries, keys):
        scores, pull = jax.vjp(lambda *args: ks.key_scores(*args, index), queries, keys)
        return scores, *pull(jnp.broadcast_to(jnp.array([10.0, 100.0]).reshape(1, 1, 1, 1, 2), scores.shape))

    scores, by_queries, by_keys = pulled_back(queries, keys)
    chex.assert_trees_all_equal(scores[0, :, 0, 0], np.array([[10, 10], [14, 14]]))
    chex.assert_trees_all_equal(by_queries.ravel(), np.array([550, 770]))
    chex.assert_trees_all_equal(by_keys[:, 0, 0, :, 0], np.array([[0, 220], [0, 220]]))


def test_common_keys_gather_the_gradients_of_all_heads():
    # Three heads with queries 1, 2 and 4 read the one key of their side, with a cotangent of one each.
    queries = jnp.broadcast_to(jnp.array([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1, 1), (1, 2, 3, 1, 1))
    index = jnp.zeros((1, 2, 3, 1), jnp.int32)
    total = jax.jit(jax.grad(lambda keys: ks.key_scores(queries, keys, index).sum()))
    gradient = total(jnp.ones((2, 1, 1, 1, 1)))
    chex.assert_trees_all_equal(gradient.ravel(), np.array([7, 7]))
