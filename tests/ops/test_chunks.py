import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import chunks

# Four tokens at a time, of three values each: the whole, whole chunks, and chunks and a rest.
_tokens = pytest.mark.parametrize(
    "tokens, sizes", [(1, {1}), (4, {4}), (5, {4, 1}), (8, {4}), (11, {4, 3}), (12, {4})]
)


@pytest.fixture(autouse=True)
def _four_tokens_of_three_values(monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK_VALUES", 14)


def _arrays(tokens):
    rng = np.random.default_rng(tokens)
    return (
        jnp.asarray(rng.standard_normal((tokens, 3)), jnp.float32),
        jnp.asarray(rng.integers(0, 6, tokens), jnp.int32),
    )


@_tokens
def test_map_equals_the_function_for_every_array_of_a_tree(tokens, sizes):
    seen = set()

    def function(x, index):
        seen.add(x.shape[0])
        assert index.shape[0] == x.shape[0]
        return {"pair": (x * 2, index + 1), "outer": x[:, :, None] * x[:, None, :]}

    x, index = _arrays(tokens)
    found = jax.jit(lambda *arrays: chunks.map_chunks(function, 3, *arrays))(x, index)
    assert seen == sizes
    expected = function(np.asarray(x), np.asarray(index))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@_tokens
def test_fold_adds_every_token_to_the_start_once(tokens, sizes):
    seen = set()

    def add(total, x, index):
        seen.add(x.shape[0])
        sums, counts = total
        return sums.at[index].add(x), counts.at[index].add(1)

    x, index = _arrays(tokens)
    sums, counts = np.random.default_rng(0).standard_normal((6, 3)), np.arange(6)
    start = jnp.asarray(sums, jnp.float32), jnp.asarray(counts, jnp.int32)
    found = jax.jit(lambda start, *arrays: chunks.fold_chunks(add, start, 3, *arrays))(start, x, index)
    assert seen == sizes
    np.add.at(sums, np.asarray(index), np.asarray(x, np.float64))
    np.testing.assert_allclose(found[0], sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[1], counts + np.bincount(index, minlength=6))


def test_more_values_than_fit_go_token_by_token():
    seen = set()

    def function(x):
        seen.add(x.shape[0])
        return x + 1

    x = jnp.arange(3, dtype=jnp.float32)
    np.testing.assert_array_equal(chunks.map_chunks(function, 1000, x), [1, 2, 3])
    total = chunks.fold_chunks(lambda total, x: total + function(x).sum(), jnp.float32(0), 1000, x)
    assert total == 6 and seen == {1}


@pytest.mark.parametrize("tokens", [4, 8, 11])
def test_jit_and_gradients_pass_through_map(tokens):
    # A matrix closed over meets every chunk: its gradient is the sum over all of them.
    x, index = _arrays(tokens)
    rng = np.random.default_rng(0)
    matrix, weight = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 5), (tokens, 5)))

    def total(mapped, x, matrix):
        def function(x, index):
            y = jnp.tanh(x @ matrix)
            return {"y": y, "scaled": y * index[:, None].astype(y.dtype)}

        found = mapped(function, x, index)
        return ((found["y"] + found["scaled"]) * weight).sum()

    def in_chunks(function, *arrays):
        return chunks.map_chunks(function, 3, *arrays)

    def whole(function, *arrays):
        return function(*arrays)

    found, expected = (
        jax.jit(jax.value_and_grad(lambda *args, mapped=mapped: total(mapped, *args), (0, 1)))(x, matrix)
        for mapped in (in_chunks, whole)
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_without_jit_chunks_are_made_as_well():
    x, index = _arrays(11)
    mapped = chunks.map_chunks(lambda x: x + 1, 3, x)
    np.testing.assert_array_equal(mapped, np.asarray(x) + np.float32(1))
    counts = chunks.fold_chunks(lambda n, index: n.at[index].add(1), jnp.zeros(6, jnp.int32), 3, index)
    np.testing.assert_array_equal(counts, np.bincount(index, minlength=6))
