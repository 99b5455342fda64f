"""From logits to the next token: greedy, or a draw by temperature, top-k and top-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ultramem_jax.errors import at_least, require
from ultramem_jax.ops.topk import top_k as largest

_COLDEST = 1e-30
"""A temperature that float32 divides by safely, and that already leaves the likeliest token alone."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; in the order of the fields, each of what the one before it leaves."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token, whatever the other fields say."""
    top_k: int = 0
    """Only the k likeliest tokens are drawn (arXiv 1805.04833, section 5.4). 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn, the one that reaches it among
    them (nucleus sampling, arXiv 1904.09751, section 3.1). 1: all."""

    def __post_init__(self) -> None:
        at_least(0, temperature=self.temperature, top_k=self.top_k)
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """A token for each sequence.

    Args:
        logits: (B, V) float32.
        keys: (B,) keys of random numbers, one for each sequence, whose draw then is its own.
        sampling: how.

    Returns:
        (B,) int32.
    """
    if sampling.temperature == 0:
        return likeliest(logits)
    # Of the largest as zero: divided by a small temperature, the others may overflow, but never it.
    logits = (logits - logits.max(-1, keepdims=True)) / max(sampling.temperature, _COLDEST)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return _draw(keys, logits)
    kept = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    values, ids = largest(logits, kept)
    probabilities = jax.nn.softmax(values, axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The likeliest stays in any case: nothing is likelier.
    values = jnp.where(likelier < sampling.top_p, values, -jnp.inf)
    return jnp.take_along_axis(ids, _draw(keys, values)[:, None], axis=-1)[:, 0]


def likeliest(logits: jax.Array) -> jax.Array:
    """The first of the largest logits (B, V) of each sequence: (B,) int32."""
    # XLA on CPU takes 16 ms for the argmax of 64 rows of 50,432, one value after the other; this is 0.7 ms.
    return largest(logits, 1)[1][:, 0].astype(jnp.int32)


def _draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    return likeliest(logits + noise)
