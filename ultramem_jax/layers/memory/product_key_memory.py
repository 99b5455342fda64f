"""The memory layer: Product-Key Memory and, with all of its switches on, UltraMem.

The way of a token: x -> query -> scores of both sides' keys -> retrieval of m cells a head -> virtual block
and slot of each cell -> pooled lookup -> projection. Every change of the UltraMem paper is a field of
`MemoryConfig`; the steps themselves are the pure functions of `ultramem_jax.ops`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config import MemoryConfig
from ultramem_jax.layers.memory.initializers import draw_table, memory_init
from ultramem_jax.layers.sowing import sow
from ultramem_jax.ops import addressing, lookup, product_keys

_ROWS, _COLUMNS = 0, 1


class ProductKeyMemory(nn.Module):
    """Reads m values of a table of N for every token and head; (x, *, train) -> y like every layer.

    Collections besides `params`:
        memory: `values` (N, d_v), the table. Apart from `params` because its training is row-sparse.
        buffers: `row_direction` and `column_direction` (H, r), the last u and t, for their sign; with the
            explicit shuffle also `permutation` (E·N,).
        reads (sown): `slots`, `blocks` (T, R) and `scores` (T, R, h), what was read.
        perturbations: `pooled` (T, E, d_v), whose gradient is the cotangent of the pooled reads.
        losses, metrics (sown): the core's auxiliary loss; scores, output and singular values.
    """

    config: MemoryConfig
    num_layers: int
    """L of the Transformer around it, for the initial scale of the values."""
    index: int = 0
    """Which of the model's memories this is; each has a shuffle of its own."""
    dtype: jnp.dtype = jnp.float32
    norm_eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Reads the memory.

        Args:
            x: (B, S, D).
            train: unused, part of the call that all layers share.

        Returns:
            (B, S, D) in the computation's dtype.
        """
        del train
        config, tokens, embed_dim = self.config, x.shape[0] * x.shape[1], x.shape[2]
        init = memory_init(config, embed_dim, self.num_layers)
        x = x.astype(self.dtype)
        queries = self._queries(self._convolved(x), init.query, init.query_gain)
        keys = self._keys(init.keys, init.key_gain)
        # (2, H, r, T, K), in float32 also where the product is bfloat16: near ties decide what is read.
        scores = jnp.einsum("ahqtd,ahqkd->ahqtk", queries, keys, preferred_element_type=jnp.float32)
        retrieved = self._retrieve(scores[_ROWS], scores[_COLUMNS])
        weights = nn.softmax(retrieved.scores, axis=2) if config.softmax else retrieved.scores
        self._record_scores(weights)

        blocks, slots = (_by_token(a) for a in self._addresses(retrieved.rows, retrieved.columns))
        pooled = self._lookup(slots, blocks, _by_token(weights).astype(self.dtype), init.values_std)
        if config.project_values:
            width = config.expansion * config.value_dim
            kernel = self.param("projection", init.projection, (width, embed_dim), jnp.float32)
            y = pooled.reshape(tokens, width) @ kernel.astype(self.dtype)
        else:
            y = pooled.reshape(tokens, embed_dim)
        sow(self, "metrics", "output_std", jnp.std(y.astype(jnp.float32)))
        return y.reshape(x.shape)

    def _convolved(self, x: jax.Array) -> jax.Array:
        """Causal depthwise convolution over the sequence; starts as the identity. Tap i looks i back."""
        width = self.config.query_conv_width
        if width == 0:
            return x

        def identity(_: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jnp.zeros(shape, dtype).at[0].set(1)

        kernel = self.param("query_conv", identity, (width, x.shape[-1]), jnp.float32)
        taps = kernel.astype(self.dtype)[:, None, None]
        length = x.shape[1]
        shifted = [jnp.pad(x, ((0, 0), (i, 0), (0, 0)))[:, :length] for i in range(width)]
        return sum((taps[i] * shifted[i] for i in range(1, width)), taps[0] * shifted[0])

    def _queries(self, x: jax.Array, init: nn.initializers.Initializer, gain: float) -> jax.Array:
        """(2, H, r, T, d): both sides' queries of every head and rank, of the width d that a rank has."""
        config = self.config
        shape = (x.shape[-1], 2 * config.num_queries * config.key_dim)
        kernel = self.param("query", init, shape, jnp.float32)
        queries = x.reshape(-1, x.shape[-1]) @ kernel.astype(self.dtype)
        queries = queries.reshape(-1, 2, config.num_queries, config.key_dim)
        if config.norm_query_key:
            scale = self.param("query_scale", nn.initializers.constant(gain), (config.key_dim,), jnp.float32)
            queries = self._rms_norm(queries.astype(jnp.float32), (-1,), scale).astype(self.dtype)
        ranks, split = max(config.tucker_rank, 1), config.rank_keys == "split"
        # Broadcasting the shared query over heads (and ranks) costs little beside K·d products of each.
        queries = queries.reshape(*queries.shape[:3], ranks if split else 1, config.rank_key_dim)
        queries = queries.transpose(1, 2, 3, 0, 4)
        return jnp.broadcast_to(queries, (2, config.num_heads, ranks, *queries.shape[3:]))

    def _keys(self, init: nn.initializers.Initializer, gain: float) -> jax.Array:
        """(2, H, r, K, d): both sides' keys of every head and rank, normed."""
        config = self.config
        ranks, width = max(config.tucker_rank, 1), config.rank_key_dim
        shape = (2, config.num_heads, ranks, config.num_virtual_keys, width)
        keys = self.param("keys", init, shape, jnp.float32)
        if config.norm_query_key:
            scale = self.param("key_scale", nn.initializers.constant(gain), (config.key_dim,), jnp.float32)
            # A key is d_k wide. Where the ranks split it, its norm is over all of its parts.
            split = config.rank_keys == "split"
            over = (2, 4) if split else (4,)
            keys = self._rms_norm(keys, over, scale.reshape(ranks if split else 1, 1, width))
        return keys.astype(self.dtype)

    def _rms_norm(self, x: jax.Array, axes: tuple[int, ...], scale: jax.Array) -> jax.Array:
        mean_square = jnp.mean(x * x, axis=axes, keepdims=True)
        scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
        return x * jax.lax.rsqrt(mean_square + jnp.float32(self.norm_eps)) * scale

    def _retrieve(self, row_scores: jax.Array, column_scores: jax.Array) -> product_keys.Retrieved:
        """The m cells of every head and token from both sides' scores (H, r, T, K)."""
        config = self.config
        if config.tucker_rank == 0:
            return product_keys.retrieve_product_keys(row_scores[:, 0], column_scores[:, 0], config.top_m)
        shape = (config.num_heads, config.num_cores, config.tucker_rank, config.tucker_rank)
        cores = self.param("cores", nn.initializers.uniform(1.0), shape, jnp.float32)
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
        return product_keys.retrieve_tucker(row_scores, column_scores, cores, u, t, config.top_m)

    def _addresses(self, rows: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Virtual blocks and physical slots of the cells, same shape."""
        config = self.config
        if config.shuffle == "explicit":
            size = config.expansion * config.num_slots
            permutation = self.variable(
                "buffers",
                "permutation",
                lambda: jax.random.permutation(jax.random.key(config.shuffle_seed + self.index), size),
            )
            stored = jnp.asarray(permutation.value)
            return addressing.permuted_block_and_slot(
                rows, columns, config.num_virtual_keys, config.num_slots, stored
            )
        if config.expansion == 1 or config.shuffle == "none":
            return addressing.block_and_slot(rows, columns, config.num_keys, config.expansion)
        seed = config.shuffle_seed + self.index
        return addressing.shuffled_block_and_slot(rows, columns, config.num_keys, config.expansion, seed)

    def _lookup(self, slots: jax.Array, blocks: jax.Array, scores: jax.Array, std: float) -> jax.Array:
        """The pooled reads (T, E, d_v), recorded for the row-sparse optimizer."""
        config = self.config
        table = self.variable(
            "memory",
            "values",
            lambda: draw_table(self.make_rng("params"), config.num_slots, config.value_dim, std),
        )
        for name, value in (("slots", slots), ("blocks", blocks), ("scores", scores)):
            sow(self, "reads", name, value)
        pooled = lookup.pooled_lookup(table.value, slots, blocks, scores, config.expansion)
        # A perturbation has the shape of a batch: it is the training step's, not a variable of the layer.
        return pooled if self.is_initializing() else self.perturb("pooled", pooled)

    def _record_scores(self, scores: jax.Array) -> None:
        """Mean over heads and tokens of the best and of the last chosen score, summed over cores."""
        total = scores.sum(-1)
        sow(self, "metrics", "top_1_score", total[..., 0].mean())
        sow(self, "metrics", "top_m_score", total[..., -1].mean())


def _by_token(a: jax.Array) -> jax.Array:
    """(H, T, m, ...) -> (T, H·m, ...): the reads of a token side by side."""
    a = a.swapaxes(0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])
