"""The memory layer: Product-Key Memory and, by its switches, UltraMem, UltraMemV2, Memory+ and PEER.

The way of a token: x -> query -> scores of both sides' keys -> retrieval of m cells a head -> virtual block
and slot of each cell -> [products with pre-values] -> pooled lookup -> [gate] -> projection. Every difference
between the members of the family is a field of `MemoryConfig`; the steps themselves are the pure functions of
`ultramem_jax.ops`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers.caching import CACHE, Chunk, last_tokens
from ultramem_jax.layers.memory.initializers import MemoryInit, memory_init
from ultramem_jax.layers.memory.tables import Tables, declare_tables
from ultramem_jax.layers.parameters import matrix, served_parameter
from ultramem_jax.layers.sowing import sow
from ultramem_jax.memory_config import MemoryConfig, TableLayout
from ultramem_jax.ops import addressing, product_keys, sharded_lookup
from ultramem_jax.ops.key_scores import combined_scores
from ultramem_jax.ops.linear import project
from ultramem_jax.ops.served_keys import ServedKeys


class _Family(nn.Module):
    """What the layer, and the table that several of them share, must know of the model around them."""

    config: MemoryConfig
    num_layers: int
    """L of the Transformer, for the initial scale of the values."""
    num_memories: int = 1
    """M, memories of the model: a shared table has a part for each."""
    inner_ratio: float = 4.0
    """Inner width of the feed-forward over D, for the initial scale of UltraMemV2."""

    def _layout(self) -> TableLayout:
        return self.config.layout(self.num_memories)

    def _init(self, embed_dim: int) -> MemoryInit:
        keys = self._layout().num_virtual_keys
        return memory_init(self.config, keys, embed_dim, self.num_layers, self.inner_ratio)


class SharedTables(_Family):
    """The one table that all memories of a model read, in its collection `memory`."""

    @nn.compact
    def __call__(self, embed_dim: int) -> Tables:
        """The tables, for a model of width D."""
        return declare_tables(self, self.config, self._layout().num_slots, self._init(embed_dim))


class ProductKeyMemory(_Family):
    """Reads m values of a table of N for every token and head; (x, *, train) -> y like every layer.

    Collections besides `params`:
        memory: `values` (N, d_v) and `pre_values` (N, d_p), unless the caller gives the tables.
        buffers: `row_direction` and `column_direction` (H, r), the last u and t, for their sign; with the
            explicit shuffle also `permutation` (E·n²,).
        reads (sown): `slots`, `blocks` (T, R), what was read, and `weights` (T, R, h), what it was summed
            with: the scores, after a softmax if there is one, times act(u·p) if there are pre-values; with
            these also `inputs` (T, d_p), the p.
        perturbations: `pooled` (T, blocks, d_v) and `products` (T, R), whose gradients are the cotangents of
            the pooled reads and of the products with pre-values.
            On a mesh they are what `ultramem_jax.ops.sharded_lookup` has at the owners of the tables, and so
            are the reads.
        losses, metrics (sown): the auxiliary losses; scores, output and singular values.
    """

    index: int = 0
    """Which of the model's memories this is; each has a shuffle and a window of a shared table of its own."""
    dtype: jnp.dtype = jnp.float32
    norm_eps: float = 1e-5

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, tables: Tables | None = None, chunk: Chunk | None = None
    ) -> jax.Array:
        """Reads the memory.

        Args:
            x: (B, S, D).
            train: unused, part of the call that all layers share.
            tables: those of `SharedTables`; None if the layer has its own.
            chunk: if given, x follows on the `query_inputs` in the collection `cache`, which must be mutable.

        Returns:
            (B, S, D) in the computation's dtype.
        """
        del train
        config, embed_dim = self.config, x.shape[2]
        init = self._init(embed_dim)
        x = x.astype(self.dtype)
        queries = self._queries(self._convolved(x, chunk), init.query, init.query_gain)
        keys = self._keys(init.keys, init.key_gain)
        retrieved = self._retrieve(queries, keys)
        weights = nn.softmax(retrieved.scores, axis=2) if config.softmax else retrieved.scores
        self._record_scores(weights)

        # The R = H·m reads of a token side by side.
        blocks, slots, weights = (
            a.reshape(a.shape[0], -1, *a.shape[3:])
            for a in (*self._addresses(retrieved.rows, retrieved.columns), weights.astype(self.dtype))
        )
        slots, blocks = sharded_lookup.reads_at_owners(slots, blocks, config.num_blocks)
        sow(self, "reads", "slots", slots)
        sow(self, "reads", "blocks", blocks)
        if tables is None:
            tables = declare_tables(self, config, self._layout().num_slots, init)
        tokens = x.reshape(-1, embed_dim)
        if config.pre_value_dim:
            weights = weights * self._activations(tables["pre_values"], slots, tokens, init)[..., None]
        pooled = self._pooled(tables["values"], slots, blocks, weights)
        y = pooled.reshape(tokens.shape[0], config.num_blocks * config.value_dim)
        if config.gate:
            kernel = matrix(self, "gate", init.input, (embed_dim, config.value_dim))
            y = y * nn.silu(project(tokens, kernel))
        if config.project_values:
            y = project(y, matrix(self, "projection", init.projection, (y.shape[1], embed_dim)))
        sow(self, "metrics", "output_std", jnp.std(y.astype(jnp.float32)))
        return y.reshape(x.shape)

    def _convolved(self, x: jax.Array, chunk: Chunk | None) -> jax.Array:
        """Causal depthwise convolution over the sequence; starts as the identity. Tap i looks i back."""
        width = self.config.query_conv_width
        if width == 0:
            return x

        def identity(_: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jnp.zeros(shape, dtype).at[0].set(1)

        kernel = self.param("query_conv", identity, (width, x.shape[-1]), jnp.float32)
        taps = kernel.astype(self.dtype)[:, None, None]
        back, length = width - 1, x.shape[1]
        if chunk is None or back == 0:
            sequence = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))
        else:
            sequence = jnp.concatenate([self.get_variable(CACHE, "query_inputs"), x], axis=1)
            self.put_variable(CACHE, "query_inputs", last_tokens(sequence, chunk.counts, back))
        shifted = [sequence[:, back - i : back - i + length] for i in range(width)]
        return sum((taps[i] * shifted[i] for i in range(1, width)), taps[0] * shifted[0])

    def _queries(self, x: jax.Array, init: nn.initializers.Initializer, gain: float) -> jax.Array:
        """(T, 2, H, q, d): both sides' queries of every head and rank, of the width d that a rank has.

        q is r, or 1 where the ranks share a query of full width.
        """
        config, ranks = self.config, self.config.num_ranks
        kernel = matrix(self, "query", init, (x.shape[-1], 2 * config.num_queries * config.key_dim))
        of_each_rank = ranks if config.query_per_rank else 1
        queries = project(x, kernel).reshape(
            -1, 2, config.num_queries // of_each_rank, of_each_rank, config.key_dim
        )
        if config.norm_query:
            scale = self.param("query_scale", nn.initializers.constant(gain), (config.key_dim,), jnp.float32)
            queries = _rms_norm(queries.astype(jnp.float32), (-1,), scale, self.norm_eps).astype(self.dtype)
        if config.rank_keys == "split":
            queries = queries.reshape(*queries.shape[:3], ranks, config.rank_key_dim)
        return jnp.broadcast_to(queries, (*queries.shape[:2], config.num_heads, *queries.shape[3:]))

    def _keys(self, init: nn.initializers.Initializer, gain: float) -> jax.Array | ServedKeys:
        """(2, S, r, K, d): both sides' keys of every head (or of all, S = 1) and rank, normed."""
        config = self.config
        if served := served_parameter(self, "keys"):
            return served
        shape = (
            2,
            config.num_key_sets,
            config.num_ranks,
            self._layout().num_virtual_keys,
            config.rank_key_dim,
        )
        keys, scale = self.param("keys", init, shape, jnp.float32), None
        if config.norm_keys:
            scale = self.param("key_scale", nn.initializers.constant(gain), (config.key_dim,), jnp.float32)
        return normed_keys(config, keys, scale, self.norm_eps).astype(self.dtype)

    def _retrieve(self, queries: jax.Array, keys: jax.Array | ServedKeys) -> product_keys.Retrieved:
        """The m cells of every token and head."""
        config = self.config
        if config.tucker_rank == 0:
            directions = jnp.ones((2, config.num_heads, 1), jnp.float32)
            retrieved = product_keys.retrieve_product_keys(queries, keys, config.top_m)
        else:
            cores, directions = self._core(keys)
            retrieved = product_keys.retrieve_tucker(queries, keys, cores, directions, config.top_m)
        if config.balance_loss_weight and not isinstance(keys, ServedKeys):
            scores = combined_scores(queries, keys, directions)
            sides = [product_keys.balance_loss(scores[i], retrieved.candidates[:, i]) for i in range(2)]
            sow(self, "losses", "balance", config.balance_loss_weight * (sides[0] + sides[1]))
        return retrieved

    def _core(self, keys: jax.Array | ServedKeys) -> tuple[jax.Array, jax.Array]:
        """The Tucker cores (H, h, r, r), and u and t (2, H, r) of their sum, which served keys know."""
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
        """Virtual blocks and physical slots of the cells, same shape."""
        config, layout = self.config, self._layout()
        if config.shuffle == "explicit":
            size = layout.num_virtual_keys**2
            permutation = self.variable(
                "buffers",
                "permutation",
                lambda: jax.random.permutation(jax.random.key(config.shuffle_seed + self.index), size),
            )
            stored = jnp.asarray(permutation.value)
            blocks, slots = addressing.permuted_block_and_slot(
                rows, columns, layout.num_virtual_keys, layout.window_slots, stored
            )
        elif config.shuffle == "none" or (config.expansion == 1 and not config.shares_table):
            blocks, slots = addressing.block_and_slot(rows, columns, layout.window_keys, config.expansion)
        else:
            seed = config.shuffle_seed + self.index
            blocks, slots = addressing.shuffled_block_and_slot(
                rows, columns, layout.window_keys, config.expansion, seed
            )
        if config.sum_blocks:
            blocks = jnp.zeros_like(blocks)
        return blocks, addressing.windowed(slots, layout.offsets[self.index], layout.num_slots)

    def _activations(
        self, pre_values: jax.Array, slots: jax.Array, x: jax.Array, init: MemoryInit
    ) -> jax.Array:
        """(T, R): act(u·p) of every slot read, u its pre-value and p the token's projection of x (T, D)."""
        config = self.config
        if config.project_pre_values:
            shape = (x.shape[-1], config.pre_value_dim)
            x = project(x, matrix(self, "pre_projection", init.input, shape))
        sums, inputs = sharded_lookup.products_at_owners(pre_values, slots, x)
        sow(self, "reads", "inputs", inputs)
        products = sharded_lookup.products_at_tokens(self._perturbed("products", sums))
        return nn.gelu(products, approximate=False) if config.pre_value_activation == "gelu" else products

    def _pooled(
        self, values: jax.Array, slots: jax.Array, blocks: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """The pooled reads (T, blocks, d_v), recorded for the row-sparse optimizer."""
        expansion = self.config.num_blocks
        sums, weights = sharded_lookup.pooled_at_owners(values, slots, blocks, weights, expansion)
        sow(self, "reads", "weights", weights)
        return sharded_lookup.pooled_at_tokens(self._perturbed("pooled", sums))

    def _perturbed(self, name: str, value: jax.Array) -> jax.Array:
        # A perturbation has the shape of a batch: it is the training step's, not a variable of the layer.
        return value if self.is_initializing() else self.perturb(name, value)

    def _record_scores(self, scores: jax.Array) -> None:
        """Mean over tokens and heads of the best and of the last chosen score, summed over cores."""
        total = scores.sum(-1)
        sow(self, "metrics", "top_1_score", total[..., 0].mean())
        sow(self, "metrics", "top_m_score", total[..., -1].mean())


def normed_keys(config: MemoryConfig, keys: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    """Keys (2, S, r, K, d) under the norm of the config, if it has one: float32, same shape.

    Args:
        config: of the memory.
        keys: the parameter `keys`.
        scale: (d_k,), the parameter `key_scale`; None if `norm_keys` is off.
        eps: of the norm.
    """
    if scale is None:
        return keys
    # A key is d_k wide. Where the ranks split it, its norm is over all of its parts.
    split = config.rank_keys == "split"
    gain = scale.reshape(config.num_ranks if split else 1, 1, config.rank_key_dim)
    return _rms_norm(keys, (2, 4) if split else (4,), gain, eps)


def _rms_norm(x: jax.Array, axes: tuple[int, ...], scale: jax.Array, eps: float) -> jax.Array:
    mean_square = jnp.mean(x * x, axis=axes, keepdims=True)
    scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return x * jax.lax.rsqrt(mean_square + jnp.float32(eps)) * scale
