"""What a model costs, from its config alone: parameters, FLOPs, bytes touched and kept. No array is built.

Two ways of counting stand side by side. The *papers'* (UltraMem, arXiv 2411.12364, tables 1 and 2) leaves out
embeddings, norm gains, attention scores and value lookups, and takes two FLOPs per weight that a token is
multiplied by; use it to stand beside published numbers. The *whole* count holds every parameter of the
parameter tree and every term of the forward pass that grows with a width. The letters are those of the axis
legend in `ultramem_jax`; c is the number of matrices in an MLP, 2 for `gelu` and 3 for `swiglu`; d_p is the
width of a pre-value. What a memory costs, its parts say (`ultramem_jax.config.memory_parts`).
"""

from collections import Counter
from dataclasses import dataclass

from ultramem_jax.config import ModelConfig, TrainConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.memory_parts import TableConfig
from ultramem_jax.errors import require

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
    memory: Counter[str]
    """Dense parameters of all memories, by the groups that their parts name (`memory_parts.Parameter`): of
    product keys `queries`, `keys`, `norms`, `cores`, `conv`; of readouts `projection`, `gate`, ...; of
    pre-values `pre_projection`. A group that no memory has counts 0."""
    memory_weights: int
    """Those of `memory` that meet a token's vector."""
    memory_matrices: int
    """Those that are weights of matrix products."""
    memory_gains: int
    """Those that papers do not count: gains of norms, and biases."""
    memory_tables: int
    """Per table N·(d_v + d_p); one table for every memory, or one for all. Sparse."""
    experts: int
    """L·X·c·D·F. Sparse."""
    active_experts: int
    """L·k·c·D·F: the part of `experts` that one token is multiplied by. Not in any sum of parameters."""

    @property
    def dense(self) -> int:
        """Every parameter that is neither a table's nor an expert's."""
        return self.paper_dense + self.embedding + self.output + self.norms + self.memory_gains

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
        return self._token_weights + self.memory_dense - self.memory_weights - self.memory_gains

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

        Not the embedding and the output, nor what memories do not call a matrix: keys and cores, which meet
        scores, and convolutions.
        """
        return self.attention + self.feed_forward + self.router + self.experts + self.memory_matrices

    @property
    def memory_dense(self) -> int:
        """All of `memory`."""
        return self.memory.total()

    @property
    def _token_weights(self) -> int:
        return self.attention + self.feed_forward + self.router + self.memory_weights


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
    memory: Counter[str]
    """Products with the parameters of memories, two per weight and use, by their groups. Keys that heads
    share are used by each of them."""
    memory_scoring: int
    """What addressers compute beside that, from scores to rows (`AddressConfig.scoring_flops`)."""
    memory_lookup: int
    """Per memory 2·R·(d_v + d_p): the weighted sum of the values read, and the products with their
    pre-values. 0 where rows are neither weighed nor summed (Engram)."""
    attention_scores: int
    """2·D·(S + 1) per layer: a token meets (S + 1)/2 positions on average, 2·D for the scores and 2·D for the
    weighted sum each. 0 where no sequence length was given."""
    logits: int
    """2·D·V."""

    @property
    def paper(self) -> int:
        """The papers' convention: 2 × `Parameters.active`, and shared keys once per head that uses them."""
        return self.attention + self.feed_forward + self.router + self.memory.total()

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
    """b·(d_v + d_p), b the bytes of `TableConfig.dtype`."""
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
    """Rows of width d_v + d_p: min(B·R, N) for every memory (ibid.); from a table that memories share, as
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
    feeding = len(config.feed_forward_layers)
    of_memories = [parameter for site in config.sites for parameter in site.parameters.values()]
    return Parameters(
        embedding=config.vocab_size * d,
        output=0 if config.tie_embeddings else d * config.vocab_size,
        attention=layers * (2 * d * d + 2 * d * kv_width),
        feed_forward=0 if moe else feeding * MLP_MATRICES[config.mlp] * d * config.mlp_dim,
        router=feeding * d * moe.num_experts if moe else 0,
        norms=(2 * layers + 1) * d + layers * attention_gains,
        experts=feeding * moe.num_experts * expert if moe else 0,
        active_experts=feeding * moe.top_k * expert if moe else 0,
        memory=Counter(_groups(config)),
        memory_weights=sum(p.size for p in of_memories if p.role in ("matrix", "weights")),
        memory_matrices=sum(p.size for p in of_memories if p.role == "matrix"),
        memory_gains=sum(p.size for p in of_memories if p.role == "gain"),
        memory_tables=sum(
            readers[0].num_slots * readers[0].config.table.row_dim for readers in table_readers(config)
        ),
    )


def flops_per_token(config: ModelConfig, seq_len: int | None = None) -> Flops:
    """FLOPs of one token's forward pass; a training step takes about three times as many.

    Args:
        config: the model.
        seq_len: S, for the attention scores of a causal sequence; None leaves them out.
    """
    parameters, weight = count_parameters(config), _FLOPS_PER_WEIGHT
    memory: Counter[str] = Counter()
    for site in config.sites:
        for parameter in site.parameters.values():
            memory[parameter.group] += parameter.flops
    scores = 2 * config.embed_dim * (seq_len + 1) * config.num_layers if seq_len else 0
    return Flops(
        attention=weight * parameters.attention,
        feed_forward=weight * (parameters.feed_forward + parameters.active_experts),
        router=weight * parameters.router,
        memory=+memory,
        memory_scoring=sum(
            site.config.address.scoring_flops(site) + site.config.readout.extra_flops(site)
            for site in config.sites
        ),
        memory_lookup=sum(site.lookup_flops for site in config.sites),
        attention_scores=scores,
        logits=weight * config.embed_dim * config.vocab_size,
    )


def row_bytes(table: TableConfig, train: TrainConfig = _DEFAULT_TRAINING) -> RowBytes:
    """Bytes of a slot in the table and in the optimizer's state; the formulas stand with `RowBytes`.

    Args:
        table: widths of a row, and what it is stored in.
        train: which moments of it are kept, and in what.
    """
    moments = sum(array.bytes(width) for array in train.row_arrays for width in table.arrays.values())
    return RowBytes(DTYPE_BYTES[table.dtype] * table.row_dim, moments)


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
            trained, float32 and tables in their own `dtype`.
        train: which moments of a table's rows there are.
    """
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "must be at least 1")
    parameters, moe = count_parameters(config), config.moe
    experts_read, table_read, moments_read = 0, 0, 0
    for readers in table_readers(config):
        table = readers[0].config.table
        rows, of_row = _rows_read(readers, batch_tokens), row_bytes(table, train)
        table_read += rows * (of_row.table if dtype_bytes is None else dtype_bytes * table.row_dim)
        moments_read += rows * of_row.moments
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
    of_tables = sum(
        readers[0].num_slots * row_bytes(readers[0].config.table, train).moments
        for readers in table_readers(config)
    )
    return _moment_bytes(count_parameters(config), train) + of_tables


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


def table_readers(config: ModelConfig) -> list[tuple[MemorySite, ...]]:
    """Returns the memories that read each table."""
    readers: dict[str, tuple[MemorySite, ...]] = {}
    for site in config.sites:
        readers[site.table] = (*readers.get(site.table, ()), site)
    return list(readers.values())


def _groups(config: ModelConfig) -> dict[str, int]:
    """Dense parameters of memories by group."""
    groups: Counter[str] = Counter()
    for site in config.sites:
        for parameter in site.parameters.values():
            groups[parameter.group] += parameter.size
    return groups


def _rows_read(readers: tuple[MemorySite, ...], batch_tokens: int) -> int:
    """Slots that a step reads of a table, each once.

    Memories with one window together read at most that window; windows that overlap, at most the table.
    """
    windows = Counter(site.window for site in readers)
    reads = batch_tokens * readers[0].config.reads_per_token
    return min(sum(min(n * reads, window.size) for window, n in windows.items()), readers[0].num_slots)
