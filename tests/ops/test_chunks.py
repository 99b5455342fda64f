import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.chunk_values import set_chunk_values
from ultramem_jax.ops import chunks

# Four tokens at a time, of three values each: the whole, whole chunks, and chunks and a rest.
_SIZES = {1: {1}, 4: {4}, 5: {4, 1}, 8: {4}, 11: {4, 3}, 12: {4}}
"""Sizes of the chunks, by the number of tokens."""


@pytest.fixture(autouse=True)
def _four_tokens_of_three_values(monkeypatch):
    set_chunk_values(monkeypatch, 14)


def _arrays(tokens):
    rng = np.random.default_rng(tokens)
    return (
        jnp.asarray(rng.standard_normal((tokens, 3)), jnp.float32),
        jnp.asarray(rng.integers(0, 6, tokens), jnp.int32),
    )


class WithAndWithoutJit(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_map_equals_the_function_for_every_array_of_a_tree(self):
        seen = set()

        def function(x, index):
            seen.add(x.shape[0])
            chex.assert_equal_shape_prefix([x, index], 1)
            return {"pair": (x * 2, index + 1), "outer": x[:, :, None] * x[:, None, :]}

        mapped = self.variant(lambda *arrays: chunks.map_chunks(function, 3, *arrays))
        for tokens, sizes in _SIZES.items():
            x, index = _arrays(tokens)
            seen.clear()
            found = mapped(x, index)
            assert seen == sizes
            expected = function(np.asarray(x), np.asarray(index))
            chex.assert_trees_all_equal(found, expected)
            chex.assert_trees_all_equal_dtypes(found, expected)

    @chex.variants(with_jit=True, without_jit=True)
    def test_fold_adds_every_token_to_the_start_once(self):
        seen = set()

        def add(total, x, index):
            seen.add(x.shape[0])
            sums, counts = total
            return sums.at[index].add(x), counts.at[index].add(1)

        folded = self.variant(lambda start, *arrays: chunks.fold_chunks(add, start, 3, *arrays))
        for tokens, sizes in _SIZES.items():
            x, index = _arrays(tokens)
            sums, counts = np.random.default_rng(0).standard_normal((6, 3)), np.arange(6)
            start = jnp.asarray(sums, jnp.float32), jnp.asarray(counts, jnp.int32)
            seen.clear()
            found = folded(start, x, index)
            assert seen == sizes
            np.add.at(sums, np.asarray(index), np.asarray(x, np.float64))
            chex.assert_trees_all_close(found[0], sums, rtol=1e-5, atol=1e-6)
            chex.assert_trees_all_equal(found[1], counts + np.bincount(index, minlength=6))


def test_more_values_than_fit_go_token_by_token():
    seen = set()

    def function(x):
        seen.add(x.shape[0])
        return x + 1

    x = jnp.arange(3, dtype=jnp.float32)
    chex.assert_trees_all_equal(chunks.map_chunks(function, 1000, x), np.array([1, 2, 3]))
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
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
