"""Implements the addresser of product keys: x -> query -> scores of keys -> m cells a head -> slots.

The steps are pure functions of `ultramem_jax.ops`: `product_keys` has TDQKR and Multi-Core Scoring,
`addressing` has Implicit Value Expansion. The config `product_keys.ProductKeys` chooses the steps.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.layers.caching import CACHE, Chunk, last_tokens
from ultramem_jax.layers.memory.addresser import Reads
from ultramem_jax.layers.memory.initializers import retrieval_init
from ultramem_jax.layers.parameters import matrix, served_parameter
from ultramem_jax.layers.sowing import sow
from ultramem_jax.ops import addressing, product_keys
from ultramem_jax.ops.key_norm import rms_norm_of_keys
from ultramem_jax.ops.key_scores import combined_scores
from ultramem_jax.ops.linear import project
from ultramem_jax.ops.norms import rms_norm
from ultramem_jax.ops.served_keys import ServedKeys, serve_keys

if TYPE_CHECKING:
    from ultramem_jax.layers.memory.product_keys import ProductKeys


class ProductKeyAddresser(nn.Module):
    """Finds the m best cells of every token and head, and their rows.

    Collections besides `params`:
        buffers: `row_direction` and `column_direction` (H, r), the last u and t, which decide the sign of the
            next ones; with the explicit shuffle also `permutation` (E·n²,).
        cache: `query_inputs` (B, w - 1, D), the last inputs of a convolution of width w.
        losses, metrics (sown): the auxiliary losses; scores and singular values.
    """

    site: MemorySite
    config: "ProductKeys"

    @nn.compact
    def __call__(self, x: jax.Array, token_ids: jax.Array | None, chunk: Chunk | None) -> Reads:
        """Finds the rows for x (B, S, D); `token_ids` are not used."""
        del token_ids
        config, init = self.config, retrieval_init(self.site)
        queries = self.queries(self._convolved(x, chunk), init.query, init.query_gain)
        keys = self.keys(init.keys, init.key_gain)
        retrieved = self._retrieve(queries, keys)
        weights = nn.softmax(retrieved.scores, axis=2) if config.softmax else retrieved.scores
        self._record_scores(weights)
        # The R = H·m reads of a token become one axis.
        blocks, slots, weights = (
            a.reshape(a.shape[0], -1, *a.shape[3:])
            for a in (*self._addresses(retrieved.rows, retrieved.columns), weights.astype(x.dtype))
        )
        return Reads(slots, blocks, weights)

    def _convolved(self, x: jax.Array, chunk: Chunk | None) -> jax.Array:
        """Applies the causal depthwise convolution over the sequence, which starts as the identity.

        Tap i looks i positions back.
        """
        width = self.config.query_conv_width
        if width == 0:
            return x

        def identity(_: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jnp.zeros(shape, dtype).at[0].set(1)

        kernel = self.param("query_conv", identity, (width, x.shape[-1]), jnp.float32)
        taps = kernel.astype(x.dtype)[:, None, None]
        back, length = width - 1, x.shape[1]
        if chunk is None or back == 0:
            sequence = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))
        else:
            sequence = jnp.concatenate([self.get_variable(CACHE, "query_inputs"), x], axis=1)
            self.put_variable(CACHE, "query_inputs", last_tokens(sequence, chunk.counts, back))
        shifted = [sequence[:, back - i : back - i + length] for i in range(width)]
        return sum((taps[i] * shifted[i] for i in range(1, width)), taps[0] * shifted[0])

    @property
    def _eps(self) -> float:
        return self.site.context.norm_eps

    def queries(self, x: jax.Array, init: nn.initializers.Initializer, gain: float) -> jax.Array:
        """Returns (T, 2, H, q, d), both sides' queries of every head and rank, of a rank's width d.

        q is r, or 1 if the ranks share a query of full width.
        """
        config, ranks = self.config, self.config.num_ranks
        kernel = matrix(self, "query", init, (x.shape[-1], 2 * config.num_queries * config.key_dim))
        of_each_rank = ranks if config.query_per_rank else 1
        queries = project(x, kernel).reshape(
            -1, 2, config.num_queries // of_each_rank, of_each_rank, config.key_dim
        )
        if config.norm_query:
            scale = self.param("query_scale", nn.initializers.constant(gain), (config.key_dim,), jnp.float32)
            queries = rms_norm(queries.astype(jnp.float32), scale, self._eps).astype(x.dtype)
        if config.rank_keys == "split":
            queries = queries.reshape(*queries.shape[:3], ranks, config.rank_key_dim)
        return jnp.broadcast_to(queries, (*queries.shape[:2], config.num_heads, *queries.shape[3:]))

    def keys(self, init: nn.initializers.Initializer, gain: float) -> jax.Array | ServedKeys:
        """Returns (2, S, r, K, d), both sides' normed keys of every head (S = 1 if shared) and rank."""
        config = self.config
        if served := served_parameter(self, "keys"):
            return served
        shape = config.parameters(self.site)["keys"].shape
        keys, scale = self.param("keys", init, shape, jnp.float32), None
        if config.norm_keys:
            scale = self.param("key_scale", nn.initializers.constant(gain), (config.key_dim,), jnp.float32)
        return normed_keys(config, keys, scale, self._eps).astype(self.site.context.dtype)

    def _retrieve(self, queries: jax.Array, keys: jax.Array | ServedKeys) -> product_keys.Retrieved:
        """Retrieves the m best cells of every token and head."""
        config = self.config
        if config.tucker_rank == 0:
            directions = jnp.ones((2, config.num_heads, 1), jnp.float32)
            retrieved = product_keys.retrieve_product_keys(queries, keys, config.top_m)
        else:
            cores, directions = self.core(keys)
            retrieved = product_keys.retrieve_tucker(queries, keys, cores, directions, config.top_m)
        if config.balance_loss_weight and not isinstance(keys, ServedKeys):
            scores = combined_scores(queries, keys, directions)
            sides = [product_keys.balance_loss(scores[i], retrieved.candidates[:, i]) for i in range(2)]
            sow(self, "losses", "balance", config.balance_loss_weight * (sides[0] + sides[1]))
        return retrieved

    def core(self, keys: jax.Array | ServedKeys) -> tuple[jax.Array, jax.Array]:
        """Returns the Tucker cores (H, h, r, r), and u and t (2, H, r) of their sum.

        Served keys contain u and t already.
        """
        config = self.config
        shape = (config.num_heads, config.num_cores, config.tucker_rank, config.tucker_rank)
        cores = self.param("cores", nn.initializers.uniform(1.0), shape, jnp.float32)
        if isinstance(keys, ServedKeys):
            return cores, keys.directions
        direction = (config.num_heads, config.tucker_rank)
        last_u = self.variable("buffers", "row_direction", jnp.zeros, direction, jnp.float32)
        last_t = self.variable("buffers", "column_direction", jnp.zeros, direction, jnp.float32)
        u, t = product_keys.leading_singular_vectors(cores.sum(1), last_u.value, last_t.value)
        if self.is_mutable_collection("buffers") and not self.is_initializing():
            last_u.value, last_t.value = u, t
        if config.core_loss_weight and config.tucker_rank > 1:
            loss = product_keys.core_loss(cores, config.core_loss_margin)
            sow(self, "losses", "core", config.core_loss_weight * loss)
        for i, value in enumerate(product_keys.singular_values(cores).mean(0)):
            sow(self, "metrics", f"core_singular_value_{i + 1}", value)
        return cores, jnp.stack([u, t])

    def _addresses(self, rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns virtual blocks and physical slots of the cells, same shape."""
        config, site = self.config, self.site
        virtual_keys, window_keys = config.num_virtual_keys(site), config.window_keys(site)
        if config.shuffle == "explicit":
            size = virtual_keys**2
            permutation = self.variable(
                "buffers",
                "permutation",
                lambda: jax.random.permutation(jax.random.key(config.shuffle_seed + site.index), size),
            )
            stored = jnp.asarray(permutation.value)
            blocks, slots = addressing.permuted_block_and_slot(
                rows, columns, virtual_keys, site.window.size, stored
            )
        elif config.shuffle == "none" or (config.expansion == 1 and not site.config.table.is_shared):
            blocks, slots = addressing.block_and_slot(rows, columns, window_keys, config.expansion)
        else:
            seed = config.shuffle_seed + site.index
            blocks, slots = addressing.shuffled_block_and_slot(
                rows, columns, window_keys, config.expansion, seed
            )
        return blocks, addressing.windowed(slots, site.window.first, site.num_slots)

    def _record_scores(self, scores: jax.Array) -> None:
        """Sows the means over tokens and heads of the best and the last chosen score, summed over cores."""
        total = scores.sum(-1)
        sow(self, "metrics", "top_1_score", total[..., 0].mean())
        sow(self, "metrics", "top_m_score", total[..., -1].mean())


def normed_keys(config: "ProductKeys", keys: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    """Applies the norm of the config, if it has one, to keys (2, S, r, K, d): float32, same shape.

    Args:
        config: the memory's config.
        keys: the parameter `keys`.
        scale: (d_k,), the parameter `key_scale`; None if `norm_keys` is off.
        eps: epsilon of the norm.
    """
    if scale is None:
        return keys
    # A key has width d_k. If the ranks split it, its norm is over all of its parts.
    split = config.rank_keys == "split"
    gain = scale.reshape(config.num_ranks if split else 1, config.rank_key_dim)
    return rms_norm_of_keys(keys, gain, eps)


def served_keys(
    site: MemorySite,
    config: "ProductKeys",
    params: Mapping[str, jax.Array],
    buffers: Mapping[str, jax.Array],
) -> ServedKeys:
    """Returns the keys of a memory as a served model holds them.

    Args:
        site: the memory.
        config: its address.
        params: its parameters.
        buffers: its buffers, for the sign of the singular vectors.
    """
    keys = normed_keys(config, params["keys"], params.get("key_scale"), site.context.norm_eps)
    directions = jnp.ones((2, config.num_heads, 1), jnp.float32)
    if config.tucker_rank:
        last = buffers["row_direction"], buffers["column_direction"]
        directions = jnp.stack(product_keys.leading_singular_vectors(params["cores"].sum(1), *last))
    return serve_keys(keys.astype(site.context.dtype), directions)
