"""Implements the addresser of Engram, whose config is `HashedNgrams`."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.errors import UserError
from ultramem_jax.layers.caching import CACHE, Chunk, last_tokens
from ultramem_jax.layers.memory.addresser import Reads
from ultramem_jax.layers.memory.hashed_ngrams import HashedNgrams
from ultramem_jax.ops.ngram_constants import multipliers
from ultramem_jax.ops.ngram_hash import exact_slots, ngram_slots


class NgramAddresser(nn.Module):
    """Hashes the n-grams that end at every token.

    Collections:
        buffers: with canonical ids, `canonical_ids` (V,) int32, token -> canonical id.
        cache: `token_ids` (B, n_max - 1) int32, the last canonical ids.
    """

    site: MemorySite
    config: HashedNgrams

    @nn.compact
    def __call__(self, x: jax.Array, token_ids: jax.Array | None, chunk: Chunk | None) -> Reads:
        """Finds the rows for token_ids (B, S); of x (B, S, D) only the dtype matters.

        Raises:
            UserError: there are no token ids.
        """
        if token_ids is None:
            raise UserError("token_ids: must be given, (B, S): this memory is addressed by tokens")
        config, site, padding = self.config, self.site, jnp.asarray(self.config.pad_id, jnp.int32)
        ids = token_ids.astype(jnp.int32)
        if config.num_canonical_ids:
            size = site.context.vocab_size
            some = lambda: jnp.arange(size, dtype=jnp.int32) % config.num_canonical_ids  # noqa: E731
            canonical = jnp.asarray(self.variable("buffers", "canonical_ids", some).value, jnp.int32)
            ids, padding = canonical.at[ids].get(mode="clip"), canonical[config.pad_id]
        slots = exact_slots(ids) if config.exact else self._hashed(ids, padding, chunk)
        rows = config.head_rows(site)
        first = np.asarray([0, *itertools.accumulate(rows[:-1])], np.int32)
        slots = (slots + first[None, None]).reshape(-1, len(rows))
        blocks = jnp.broadcast_to(jnp.arange(len(rows), dtype=jnp.int32)[None], slots.shape)
        return Reads(slots, blocks, jnp.ones((*slots.shape, 1), x.dtype))

    def _hashed(self, ids: jax.Array, padding: jax.Array, chunk: Chunk | None) -> jax.Array:
        """Returns (B, S, R), the row of each head's own table."""
        config, site = self.config, self.site
        back = config.max_order - 1
        previous = jnp.broadcast_to(padding[None, None], (ids.shape[0], back))
        if chunk is not None and back:
            cached = jnp.asarray(self.get_variable(CACHE, "token_ids"))
            # A sequence that has just begun has fewer earlier tokens. The rest is padding.
            there = jnp.arange(back)[None] >= back - chunk.positions[:, :1]
            previous = jnp.where(there, cached, previous)
            sequence = jnp.concatenate([previous, ids], axis=1)
            kept = last_tokens(sequence[:, :, None], chunk.counts, back)
            self.put_variable(CACHE, "token_ids", kept[:, :, 0])
        factors = multipliers(
            config.seed,
            site.span.start,
            config.num_canonical_ids or site.context.vocab_size,
            config.max_order,
        )
        return ngram_slots(
            ids, factors, config.head_rows(site), config.orders, pad_id=config.pad_id, previous=previous
        )
