"""From logits to the next token: greedy, or a draw by temperature, top-k and top-p."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ultramem_jax.config.field_types import Checked
from ultramem_jax.errors import at_least, require
from ultramem_jax.ops.topk import top_k as largest

_FEW = 1024
"""Tokens among which the nucleus of top-p is sought first."""
_COLDEST = 1e-30
"""A temperature that float32 divides by safely, and that already leaves the likeliest token alone."""


@dataclass(frozen=True)
class Sampling(Checked):
    """How a token is chosen; in the order of the fields, each of what the one before it leaves."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token, whatever the other fields say."""
    top_k: int = 0
    """Only the k likeliest tokens are drawn (arXiv 1805.04833, section 5.4). 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn, the one that reaches it among
    them (nucleus sampling, arXiv 1904.09751, section 3.1). 1: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        return likeliest(logits + _noise(keys, logits.shape[1]))
    vocabulary = logits.shape[1]
    draw = partial(_draw_likely, keys=keys, top_p=sampling.top_p)
    if sampling.top_k or vocabulary <= _FEW:
        values, ids = largest(logits, min(sampling.top_k or vocabulary, vocabulary))
        return draw(values, ids, total=jnp.exp(values).sum(-1, keepdims=True))
    # The likeliest of all, in order, take 650 ms for 64 rows of 50,432. Mostly few of them are enough.
    total = jnp.exp(logits).sum(-1, keepdims=True)
    values, ids = largest(logits, _FEW)
    enough = (jnp.exp(values).sum(-1, keepdims=True) >= sampling.top_p * total).all()
    return jax.lax.cond(
        enough,
        lambda: draw(values, ids, total=total),
        lambda: draw(*largest(logits, vocabulary), total=total),
    )


def likeliest(logits: jax.Array) -> jax.Array:
    """The first of the largest logits (B, V) of each sequence: (B,) int32."""
    # XLA on CPU takes 16 ms for the argmax of 64 rows of 50,432, one value after the other; this is 0.7 ms.
    return largest(logits, 1)[1][:, 0].astype(jnp.int32)


def _draw_likely(
    values: jax.Array, ids: jax.Array, *, total: jax.Array, keys: jax.Array, top_p: float
) -> jax.Array:
    """Draws among logits (B, n), likeliest first, of which the exponentials of all add up to `total`."""
    probabilities = jnp.exp(values) / total
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The likeliest stays in any case: nothing is likelier.
    values = jnp.where(likelier < top_p, values, -jnp.inf)
    # The noise of the first few is the same however many follow: a draw knows nothing of other sequences.
    noise = _noise(keys, min(values.shape[1], _FEW))
    if more := values.shape[1] - noise.shape[1]:
        others = _noise(jax.vmap(jax.random.fold_in, (0, None))(keys, 1), more)
        noise = jnp.concatenate([noise, others], axis=1)
    return jnp.take_along_axis(ids, likeliest(values + noise)[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _noise(keys: jax.Array, count: int) -> jax.Array:
    """(B, count), with which the largest sum is a draw from the softmax (the Gumbel-max trick)."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32))(keys)
