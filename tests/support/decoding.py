"""Decodes tokens through a cache, to compare with the whole sequence."""

import chex
import jax
import numpy as np

from ultramem_jax.models import Transformer
from ultramem_jax.models.cache import empty_cache


def decoded(config, variables, tokens, cache_dtype="float32"):
    """Returns (sequence, position, logits after it) of tokens that go through a cache in uneven chunks.

    `tokens` has two sequences of at least 8 tokens.
    """
    step = jax.jit(
        lambda variables, tokens, counts: Transformer(config).apply(
            variables, tokens, counts=counts, mutable=["cache"]
        )
    )
    cache, found = empty_cache(config, 2, 16, cache_dtype), []
    done = np.zeros(2, np.int32)
    for counts in ([4, 2], [0, 4], [1, 1], [1, 0], [1, 1]):
        size = 4 if max(counts) > 1 else 1
        chunk = np.full((2, size), 3, np.int32)  # the padding is a token like any other
        for row, (first, count) in enumerate(zip(done, counts, strict=True)):
            chunk[row, :count] = tokens[row, first : first + count]
        logits, left = step(variables | {"cache": cache}, chunk, np.array(counts, np.int32))
        cache, done = left["cache"], done + counts
        found += [(row, done[row] - 1, logits[row]) for row in range(2) if counts[row]]
    assert cache["lengths"].tolist() == done.tolist()
    return found


def assert_decodes(config, variables, tokens, full, atol=2e-5):
    """Asserts that tokens that go through a cache in uneven chunks get the logits of the whole sequence."""
    for row, position, logits in decoded(config, variables, tokens):
        chex.assert_trees_all_close(logits, full[row, position], rtol=1e-4, atol=atol)
