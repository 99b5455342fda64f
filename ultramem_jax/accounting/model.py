"""What a model costs, from its config alone: parameters, FLOPs, bytes touched and kept. No array is built.

Two ways of counting stand side by side. The *papers'* (UltraMem, arXiv 2411.12364, tables 1 and 2) leaves out
embeddings, norm gains, attention scores and value lookups, and takes two FLOPs per weight that a token is
multiplied by; use it to stand beside published numbers. The *whole* count holds every parameter of the
parameter tree and every term of the forward pass that grows with a width. The letters are those of the axis
legend in `ultramem_jax`; c is the number of matrices in an MLP, 2 for `gelu` and 3 for `swiglu`; d_p is the
width of a pre-value. K and N are those of `ModelConfig.layout`: a table that memories share may have more
slots than the n² of one memory, and a memory that reads a wider window of it has more keys.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from ultramem_jax.config import MemoryConfig, ModelConfig, TrainConfig
from ultramem_jax.errors import require
from ultramem_jax.memory_config import TableLayout

MLP_MATRICES = {"gelu": 2, "swiglu": 3}
"""c: in and out; a gated MLP (arXiv 2002.05202) has a second matrix in."""
_FLOPS_PER_WEIGHT = 2
"""One multiplication and one addition."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
FLOAT32_BYTES = DTYPE_BYTES["float32"]
"""Parameters and their moments are float32 whatever the computation's dtype; rows of tables: `row_bytes`."""
_DEFAULT_TRAINING = TrainConfig()


@dataclass(frozen=True)
class Parameters:
    """Number of parameters by component, over all layers and memories.

    Buffers are not parameters: the stored permutation of a shuffle, and the singular vectors u and t.
    """

    embedding: int
    """V·D."""
    output: int
    """D·V, or 0 when it is the embedding, transposed."""
    attention: int
    """L·(2·D·D + 2·D·(kv heads)·D/A): query, output, key, value."""
    feed_forward: int
    """L·c·D·F, or 0 when experts take the MLPs' place."""
    router: int
    """L·D·X."""
    norms: int
    """(2·L + 1)·D: a gain before attention, one before the feed-forward, one at the end. With
    `attention_qk_norm` L·(D + (kv heads)·D/A) more: gains of the queries and of the keys of attention."""
    memory_queries: int
    """Per memory D·2·(queries)·d_k: a row and a column query, one pair shared by the heads or one each, and
    r times as many with `query_per_rank`."""
    memory_keys: int
    """Per memory 2·(key sets)·max(r, 1)·K·(width of a rank's key); H key sets, or one that the heads share.
    With H sets that is 2·H·K·d_k where the ranks split d_k, and r times that where each has all of it."""
    memory_norms: int
    """Per memory d_k for the gain of queries and d_k for that of keys, where there is such a norm. A gain is
    common to sides and heads (and to full ranks)."""
    memory_cores: int
    """Per memory h·H·r²."""
    memory_projection: int
    """Per memory E·d_v·D, or d_v·D if the blocks are summed first."""
    memory_pre_projection: int
    """Per memory D·d_p, the map from x to what the pre-values are multiplied by."""
    memory_gate: int
    """Per memory D·d_v."""
    memory_conv: int
    """Per memory D·w, a causal depthwise convolution of width w."""
    memory_tables: int
    """Per table N·(d_v + d_p); one table for every memory, or one for all. Sparse."""
    experts: int
    """L·X·c·D·F. Sparse."""
    active_experts: int
    """L·k·c·D·F: the part of `experts` that one token is multiplied by. Not in any sum of parameters."""

    @property
    def dense(self) -> int:
        """Every parameter that is neither a table's nor an expert's."""
        return self.paper_dense + self.embedding + self.output + self.norms + self.memory_norms

    @property
    def sparse(self) -> int:
        """Value tables and all experts' weights: "sparse params" of table 2."""
        return self.memory_tables + self.experts

    @property
    def total(self) -> int:
        """Every parameter."""
        return self.dense + self.sparse

    @property
    def paper_dense(self) -> int:
        """The "dense params" of table 2: no embeddings, no gains. 12·L·D² for dense models."""
        return self._token_weights + self.memory_cores

    @property
    def paper_total(self) -> int:
        """The "params" of table 1: without embeddings and gains."""
        return self.paper_dense + self.sparse

    @property
    def active(self) -> int:
        """Weights of the matrices that one token's vector is multiplied by, k experts among them.

        Stored weights, each once: keys that the heads share are used once per head, which `Flops` counts.
        Cores are left out: they meet scores, never a token's vector (16 numbers a memory; see
        `Flops.memory_scoring` for what they cost).
        """
        return self._token_weights + self.active_experts

    @property
    def active_total(self) -> int:
        """The "active parameters" of OLMoE (arXiv 2409.02060) and UltraMemV2: embeddings and gains count.

        Every parameter but the tables and the experts that a token does not visit. The rows that a token
        reads are left out as well; in the published models they are 0.2 % of this or less.
        """
        return self.dense + self.active_experts

    @property
    def matrices(self) -> int:
        """Counts the weights of matrix products, experts' among them, which Muon orthogonalizes.

        Not the embedding and the output, nor keys and cores, which meet scores, nor a convolution.
        """
        memory = self.memory_queries + self.memory_projection + self.memory_pre_projection + self.memory_gate
        return self.attention + self.feed_forward + self.router + self.experts + memory

    @property
    def _token_weights(self) -> int:
        memory = self.memory_queries + self.memory_conv + self.memory_keys + self.memory_projection
        memory += self.memory_pre_projection + self.memory_gate
        return self.attention + self.feed_forward + self.router + memory


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token's forward pass; a multiplication and an addition are two.

    Left out of every field, because no width multiplies them: norms, activations, softmaxes, residual sums,
    the gate's products, the comparisons of a top-k, and the integer arithmetic of addresses. Auxiliary losses
    belong to training and are left out too.
    """

    attention: int
    """Query, key, value and output projections."""
    feed_forward: int
    """The MLPs, or the k experts of a token."""
    router: int
    memory_queries: int
    """Query projections and convolutions."""
    memory_keys: int
    """Scores of all K row and K column keys, for every head and rank; also where the heads share the keys."""
    memory_projection: int
    """Pooled values -> D."""
    memory_pre_projection: int
    """D -> d_p."""
    memory_gate: int
    """D -> d_v."""
    memory_scoring: int
    """From key scores to cells, per head. r = 0: m² sums and m for the chosen. r >= 1: 2·2·r·K for the best
    rank-1 scores of both sides, 2·r²·m + 2·r·m² for the exact grid, h·m·(2·r² + 2·r) for the cores."""
    memory_lookup: int
    """Per memory 2·H·m·(d_v + d_p): the weighted sum of the values read, and the products with their
    pre-values."""
    attention_scores: int
    """2·D·(S + 1) per layer: a token meets (S + 1)/2 positions on average, 2·D for the scores and 2·D for the
    weighted sum each. 0 where no sequence length was given."""
    logits: int
    """2·D·V."""

    @property
    def paper(self) -> int:
        """The papers' convention: 2 × `Parameters.active`, and shared keys once per head that uses them."""
        memory = self.memory_queries + self.memory_keys + self.memory_projection
        memory += self.memory_pre_projection + self.memory_gate
        return self.attention + self.feed_forward + self.router + memory

    @property
    def matched(self) -> int:
        """`paper` plus scoring and lookup: all that differs between systems of one D, L, V and S."""
        return self.paper + self.memory_scoring + self.memory_lookup

    @property
    def total(self) -> int:
        """Everything, the logits and (if a sequence length was given) the attention scores among it."""
        return self.matched + self.attention_scores + self.logits


@dataclass(frozen=True)
class RowBytes:
    """Bytes that a slot occupies in training, its value and its pre-value together."""

    table: int
    """b·(d_v + d_p), b the bytes of `MemoryConfig.table_dtype`."""
    moments: int
    """Σ over `TrainConfig.row_arrays`. AdamW: 2·b·(d_v + d_p), b the bytes of `TrainConfig.row_moment_dtype`.
    With one second moment per row b·(d_v + d_p), and 4 for each of a slot's rows: one, or two where there are
    pre-values. The last step of `adamw_catch_up` is 4 bytes more for each of these. `adagrad` and
    `sgd_momentum`: b·(d_v + d_p); `adagrad_row`: 4 for each row; `sgd`: 0."""

    @property
    def total(self) -> int:
        """Table and moments."""
        return self.table + self.moments


@dataclass(frozen=True)
class Bytes:
    """Bytes that one step over `batch_tokens` tokens reads from parameters, each of them once.

    What all systems share is left out: activations and the cache of attention.
    """

    batch_tokens: int
    dense: int
    """Every dense parameter; of an embedding that is not also the output, the tokens' rows alone."""
    experts: int
    """Σ over layers of min(k·B, X) experts' weights, B the tokens of the step (UltraMem paper, figure 1c)."""
    memory: int
    """Rows of width d_v + d_p: min(B·H·m, N) for every memory (ibid.); from a table that memories share, as
    many as all of them read of it, up to the slots of their windows."""
    optimizer: int
    """Training only: the optimizer's state that a step reads and then writes. That of dense parameters and of
    all experts, whose gradient is a dense array; of tables, that of the rows that were read."""

    @property
    def sparse(self) -> int:
        """Experts and values."""
        return self.experts + self.memory

    @property
    def step(self) -> int:
        """Of a forward pass: dense and sparse."""
        return self.dense + self.sparse

    @property
    def per_token(self) -> float:
        """`step`, shared out among the tokens."""
        return self.step / self.batch_tokens


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of a model by component; the formulas stand with the fields of `Parameters`."""
    d, layers, moe = config.embed_dim, config.num_layers, config.moe
    kv_width = config.num_kv_heads * (d // config.num_heads)
    attention_gains = d + kv_width if config.attention_qk_norm else 0
    expert = MLP_MATRICES[moe.activation] * d * moe.expert_dim if moe else 0
    return Parameters(
        embedding=config.vocab_size * d,
        output=0 if config.tie_embeddings else d * config.vocab_size,
        attention=layers * (2 * d * d + 2 * d * kv_width),
        feed_forward=0 if moe else layers * MLP_MATRICES[config.mlp] * d * config.mlp_dim,
        router=layers * d * moe.num_experts if moe else 0,
        norms=(2 * layers + 1) * d + layers * attention_gains,
        experts=layers * moe.num_experts * expert if moe else 0,
        active_experts=layers * moe.top_k * expert if moe else 0,
        **_memory_parameters(config),
    )


def flops_per_token(config: ModelConfig, seq_len: int | None = None) -> Flops:
    """FLOPs of one token's forward pass; a training step takes about three times as many.

    Args:
        config: the model.
        seq_len: S, for the attention scores of a causal sequence; None leaves them out.
    """
    parameters, weight = count_parameters(config), _FLOPS_PER_WEIGHT
    memory, layout, memories = config.memory, config.layout, len(config.spans)
    key_uses, scoring, lookup = 1, 0, 0
    if memory and layout:
        key_uses = memory.num_heads // memory.num_key_sets
        scoring = memories * _scoring_flops(memory, layout)
        lookup = memories * weight * memory.num_heads * memory.top_m * memory.row_dim
    scores = 2 * config.embed_dim * (seq_len + 1) * config.num_layers if seq_len else 0
    return Flops(
        attention=weight * parameters.attention,
        feed_forward=weight * (parameters.feed_forward + parameters.active_experts),
        router=weight * parameters.router,
        memory_queries=weight * (parameters.memory_queries + parameters.memory_conv),
        memory_keys=weight * parameters.memory_keys * key_uses,
        memory_projection=weight * parameters.memory_projection,
        memory_pre_projection=weight * parameters.memory_pre_projection,
        memory_gate=weight * parameters.memory_gate,
        memory_scoring=scoring,
        memory_lookup=lookup,
        attention_scores=scores,
        logits=weight * config.embed_dim * config.vocab_size,
    )


def row_bytes(memory: MemoryConfig, train: TrainConfig = _DEFAULT_TRAINING) -> RowBytes:
    """Bytes of a slot in the table and in the optimizer's state; the formulas stand with `RowBytes`.

    Args:
        memory: widths of a row, and what it is stored in.
        train: which moments of it are kept, and in what.
    """
    widths = [width for width in (memory.value_dim, memory.pre_value_dim) if width]
    moments = sum(array.bytes(width) for array in train.row_arrays for width in widths)
    return RowBytes(DTYPE_BYTES[memory.table_dtype] * memory.row_dim, moments)


def bytes_per_token(
    config: ModelConfig,
    batch_tokens: int,
    dtype_bytes: int | None = None,
    train: TrainConfig = _DEFAULT_TRAINING,
) -> Bytes:
    """Bytes of parameters that a step over `batch_tokens` tokens reads; `.per_token` shares them out.

    Experts and values are counted as if no two tokens chose the same one until all are chosen, as the paper
    does; choices that coincide read less.

    Args:
        config: the model.
        batch_tokens: tokens of the step: B·S in training and prefill, B in decoding.
        dtype_bytes: bytes of every stored parameter, 2 for weights served in bfloat16; None as they are
            trained, float32 and tables in their `table_dtype`.
        train: which moments of a table's rows there are.
    """
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "must be at least 1")
    parameters, moe, memory = count_parameters(config), config.moe, config.memory
    experts_read, table_read, moments_read = 0, 0, 0
    if memory:
        rows, of_row = _rows_read(config, batch_tokens), row_bytes(memory, train)
        table_read = rows * (of_row.table if dtype_bytes is None else dtype_bytes * memory.row_dim)
        moments_read = rows * of_row.moments
    if moe:
        weights = parameters.experts // moe.num_experts
        experts_read = min(moe.top_k * batch_tokens, moe.num_experts) * weights
    dense_read = parameters.dense
    if not config.tie_embeddings:
        dense_read -= max(config.vocab_size - batch_tokens, 0) * config.embed_dim
    stored = FLOAT32_BYTES if dtype_bytes is None else dtype_bytes
    return Bytes(
        batch_tokens=batch_tokens,
        dense=stored * dense_read,
        experts=stored * experts_read,
        memory=table_read,
        optimizer=_moment_bytes(parameters, train) + moments_read,
    )


def optimizer_bytes(config: ModelConfig, train: TrainConfig = _DEFAULT_TRAINING) -> int:
    """Bytes that the optimizers' moments of all parameters, tables included, occupy; see `moments_kept`."""
    parameters, memory = count_parameters(config), config.memory
    if memory is None:
        return _moment_bytes(parameters, train)
    slots = parameters.memory_tables // memory.row_dim
    return _moment_bytes(parameters, train) + slots * row_bytes(memory, train).moments


def moments_kept(optimizer: str, matrices: int, others: int) -> int:
    """Returns how many numbers an optimizer of dense parameters keeps: two moments of each, or a momentum.

    AdamW keeps two, Lion one; Muon one of the matrices that it orthogonalizes, and two of all else.

    Args:
        optimizer: `TrainConfig.optimizer`.
        matrices: parameters that are weights of matrix products (`Parameters.matrices`).
        others: all other parameters whose gradient is a dense array.
    """
    return {"adamw": 2, "muon": 1, "lion": 1}[optimizer] * matrices + (1 + (optimizer != "lion")) * others


def _moment_bytes(parameters: Parameters, train: TrainConfig) -> int:
    """Of the parameters whose gradient is a dense array: all but the tables."""
    others = parameters.dense + parameters.experts - parameters.matrices
    return FLOAT32_BYTES * moments_kept(train.optimizer, parameters.matrices, others)


def _memory_parameters(config: ModelConfig) -> dict[str, int]:
    """The fields of `Parameters` that belong to memories."""
    memory, layout, memories, d = config.memory, config.layout, len(config.spans), config.embed_dim
    if memory is None or layout is None:
        return {f.name: 0 for f in dataclasses.fields(Parameters) if f.name.startswith("memory_")}
    key_sets = 2 * memory.num_key_sets * memory.num_ranks
    pre_projected = memory.pre_value_dim if memory.project_pre_values else 0
    return {
        "memory_queries": memories * d * 2 * memory.num_queries * memory.key_dim,
        "memory_keys": memories * key_sets * layout.num_virtual_keys * memory.rank_key_dim,
        "memory_norms": memories * (memory.norm_query + memory.norm_keys) * memory.key_dim,
        "memory_cores": memories * memory.num_cores * memory.num_heads * memory.tucker_rank**2,
        "memory_projection": memories * memory.project_values * memory.num_blocks * memory.value_dim * d,
        "memory_pre_projection": memories * d * pre_projected,
        "memory_gate": memories * memory.gate * d * memory.value_dim,
        "memory_conv": memories * d * memory.query_conv_width,
        "memory_tables": layout.num_tables * layout.num_slots * memory.row_dim,
    }


def _scoring_flops(memory: MemoryConfig, layout: TableLayout) -> int:
    """FLOPs of one memory's retrieval after the key scores; the formula stands at `Flops.memory_scoring`."""
    r, m, k = memory.tucker_rank, memory.top_m, layout.num_virtual_keys
    if r == 0:
        return memory.num_heads * (m * m + m)
    candidates = 2 * 2 * r * k
    grid = 2 * r * r * m + 2 * r * m * m
    cores = memory.num_cores * m * (2 * r * r + 2 * r)
    return memory.num_heads * (candidates + grid + cores)


def _rows_read(config: ModelConfig, batch_tokens: int) -> int:
    """Slots that a step reads of all tables, each once."""
    memory, layout, memories = config.memory, config.layout, len(config.spans)
    if memory is None or layout is None:
        return 0
    reads = batch_tokens * memory.num_heads * memory.top_m
    if not memory.shares_table:
        return memories * min(reads, layout.num_slots)
    # Memories with one window together read at most that window; windows that overlap, at most the table.
    readers = Counter(layout.offsets).values()
    return min(sum(min(n * reads, layout.window_slots) for n in readers), layout.num_slots)
