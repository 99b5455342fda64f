"""Counts parameters, FLOPs, and bytes read and stored of a model, given only its config. It builds no array.

There are two ways of counting. The *papers'* count (UltraMem, arXiv 2411.12364, tables 1 and 2) leaves out
embeddings, norm gains, attention scores and value lookups. It takes two FLOPs per weight that a token is
multiplied by. Use it to compare with published numbers. The *whole* count includes every parameter of the
parameter tree and every term of the forward pass that grows with a width. The letters are those of the axis
legend in `ultramem_jax`. In addition, c is the number of matrices in an MLP, 2 for `gelu` and 3 for `swiglu`;
d_p is the width of a pre-value. The parts of a memory declare its costs
(`ultramem_jax.config.memory_parts`).
"""

from collections import Counter
from dataclasses import dataclass

from ultramem_jax.config import ModelConfig, TrainConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.memory_parts import TableConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import require

MLP_MATRICES = {"gelu": 2, "swiglu": 3}
"""Number c of matrices in an MLP: one in and one out; a gated MLP (arXiv 2002.05202) has a second one in."""
_FLOPS_PER_WEIGHT = 2
"""FLOPs per weight: one multiplication and one addition."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by dtype."""
FLOAT32_BYTES = DTYPE_BYTES["float32"]
"""Bytes of a dense parameter and of its moments, which are float32 whatever the dtype of the computation. For
rows of tables see `row_bytes`."""
_DEFAULT_TRAINING = TrainConfig()


@dataclass(frozen=True)
class Parameters:
    """Counts parameters by component, over all layers and memories.

    Buffers are not parameters: the stored permutation of a shuffle, and the singular vectors u and t.
    """

    embedding: int
    """Parameters of the embedding, V·D."""
    output: int
    """Parameters of the output projection: D·V, or 0 where it is the transposed embedding."""
    attention: int
    """Parameters of attention: L·D·(2·A·d + 2·A_kv·d) for query, output, key and value."""
    feed_forward: int
    """Parameters of the MLPs: L·c·D·F, or 0 where experts replace them."""
    router: int
    """Parameters of the routers: L·D·X."""
    norms: int
    """Gains of norms: (2·L + 1)·D, for one before attention, one before the feed-forward, and one at the end.
    With `attention_qk_norm` there are L·(A·d + A_kv·d) more for queries and keys of all heads, or L·2·d per
    head; with `attention_bias` L·(A·d + 2·A_kv·d) biases, and L·D of the output projection."""
    memory: Counter[str]
    """Dense parameters of all memories by group (`memory_parts.Parameter.group`). Product keys have the
    groups `queries`, `keys`, `norms`, `cores` and `conv`; readouts have `projection`, `gate`, ...; pre-values
    have `pre_projection`. A group that no memory has counts 0."""
    memory_weights: int
    """Dense parameters of memories that a token's vector is multiplied by."""
    memory_matrices: int
    """Dense parameters of memories that are weights of matrix products."""
    memory_gains: int
    """Dense parameters of memories that papers do not count: gains of norms, and biases."""
    memory_tables: int
    """Sparse parameters of tables: N·(d_v + d_p) per table. There is one table for every memory, or one that
    memories share."""
    experts: int
    """Sparse parameters of all experts: L·X·c·D·F."""
    active_experts: int
    """Parameters of the k experts of a token: L·k·c·D·F. No sum of all parameters includes this field,
    because it is a part of `experts`."""

    @property
    def dense(self) -> int:
        """Counts all parameters except for tables and experts."""
        return self.paper_dense + self.embedding + self.output + self.norms + self.memory_gains

    @property
    def sparse(self) -> int:
        """Counts the parameters of tables and of all experts: the "sparse params" of table 2."""
        return self.memory_tables + self.experts

    @property
    def total(self) -> int:
        """Counts all parameters."""
        return self.dense + self.sparse

    @property
    def paper_dense(self) -> int:
        """Counts the "dense params" of table 2: no embeddings and no gains. Dense models have 12·L·D²."""
        return self._token_weights + self.memory_dense - self.memory_weights - self.memory_gains

    @property
    def paper_total(self) -> int:
        """Counts the "params" of table 1: all parameters without embeddings and gains."""
        return self.paper_dense + self.sparse

    @property
    def active(self) -> int:
        """Counts the weights of the matrices that a token's vector is multiplied by, including k experts.

        Every stored weight counts once. Keys that the heads share are used once per head, which `Flops`
        counts. Cores are left out because they multiply scores and never a token's vector. They are 16
        numbers per memory; `Flops.memory_scoring` has their cost.
        """
        return self._token_weights + self.active_experts

    @property
    def active_total(self) -> int:
        """Counts the "active parameters" of OLMoE (arXiv 2409.02060) and UltraMemV2.

        These are all parameters, including embeddings and gains, except for tables and the experts that a
        token does not visit. The rows that a token reads are also left out. In the published models they are
        at most 0.2 % of this count.
        """
        return self.dense + self.active_experts

    @property
    def matrices(self) -> int:
        """Counts the weights of matrix products, including those of experts, which Muon orthogonalizes.

        It leaves out the embedding, the output, and the parameters of memories that are not matrices: keys
        and cores, which give or multiply scores, and convolutions.
        """
        return self.attention + self.feed_forward + self.router + self.experts + self.memory_matrices

    @property
    def memory_dense(self) -> int:
        """Counts all dense parameters of memories."""
        return self.memory.total()

    @property
    def _token_weights(self) -> int:
        """Counts the weights, without experts, that a token's vector is multiplied by."""
        return self.attention + self.feed_forward + self.router + self.memory_weights


@dataclass(frozen=True)
class Flops:
    """Counts the floating-point operations (FLOPs) of a token's forward pass.

    A multiplication and an addition are two. Every field leaves out operations that no width multiplies:
    norms, activations, softmaxes, residual sums, the gate's products, the comparisons of a top-k, and the
    integer arithmetic of addresses. Auxiliary losses belong to training and are also left out.
    """

    attention: int
    """FLOPs of the query, key, value and output projections."""
    feed_forward: int
    """FLOPs of the MLPs, or of the k experts of a token."""
    router: int
    """FLOPs of the routers."""
    memory: Counter[str]
    """FLOPs of products with the dense parameters of memories by group, two per weight and use. Each head
    counts as one use of the keys that heads share."""
    memory_scoring: int
    """FLOPs of addressers from scores to rows (`AddressConfig.scoring_flops`), and those of readouts
    beside products with parameters (`ReadoutConfig.extra_flops`)."""
    memory_lookup: int
    """FLOPs of lookups, 2·R·(d_v + d_p) per memory: the weighted sum of the values read, and the products
    with their pre-values. 0 where nothing weighs or sums rows (Engram)."""
    attention_scores: int
    """FLOPs of attention over the sequence: 2·D·(S + 1) per layer. A token attends to (S + 1)/2 positions on
    average, with 2·D for the score and 2·D for the weighted sum of each. 0 if no sequence length is given."""
    logits: int
    """FLOPs of the logits, 2·D·V."""

    @property
    def paper(self) -> int:
        """Counts FLOPs like the papers: 2 × `Parameters.active`, with shared keys once per head."""
        return self.attention + self.feed_forward + self.router + self.memory.total()

    @property
    def matched(self) -> int:
        """Counts `paper` plus scoring and lookup: all that differs between systems of equal D, L, V and S."""
        return self.paper + self.memory_scoring + self.memory_lookup

    @property
    def total(self) -> int:
        """Counts all FLOPs, including the logits and, if a sequence length is given, the attention scores."""
        return self.matched + self.attention_scores + self.logits


@dataclass(frozen=True)
class RowBytes:
    """Counts the bytes that a slot occupies in training, its value and its pre-value together."""

    table: int
    """Bytes of a slot in the table: b·(d_v + d_p), where b is the bytes of `TableConfig.dtype`."""
    moments: int
    """Bytes of a slot's moments, the sum over `TrainConfig.row_arrays`. AdamW: 2·b·(d_v + d_p), where b is
    the bytes of `TrainConfig.row_moment_dtype`. With one second moment per row b·(d_v + d_p), plus 4 for each
    row of the slot: one, or two where there are pre-values. `adamw_catch_up` adds 4 bytes for each of these
    rows, for the last step that read it. `adagrad` and `sgd_momentum`: b·(d_v + d_p); `adagrad_row`: 4 for
    each row; `sgd`: 0."""

    @property
    def total(self) -> int:
        """Counts the bytes of table and moments."""
        return self.table + self.moments


@dataclass(frozen=True)
class Bytes:
    """Counts the bytes of parameters that one step over `batch_tokens` tokens reads, each parameter once.

    Activations and the cache of attention are left out, because all systems share them.
    """

    batch_tokens: int
    """Number of tokens of the step."""
    dense: int
    """Bytes of all dense parameters. Of an embedding that is not also the output, only the tokens' rows."""
    experts: int
    """Bytes of the weights of min(k·B, X) experts, summed over layers, where B is the tokens of the step
    (UltraMem paper, figure 1c)."""
    memory: int
    """Bytes of rows of width d_v + d_p: min(B·R, N) rows for every memory (UltraMem paper, figure 1c). From a
    table that memories share, all of them together read at most the slots of their windows."""
    optimizer: int
    """Bytes of optimizer state that a training step reads and then writes: the state of dense parameters and
    of all experts, whose gradients are dense arrays, and the state of the table rows that were read."""

    @property
    def sparse(self) -> int:
        """Counts the bytes of experts and table rows."""
        return self.experts + self.memory

    @property
    def step(self) -> int:
        """Counts the bytes of a forward pass, dense and sparse."""
        return self.dense + self.sparse

    @property
    def per_token(self) -> float:
        """Counts the bytes of a forward pass per token."""
        return self.step / self.batch_tokens


def count_parameters(config: ModelConfig) -> Parameters:
    """Returns the parameters of a model by component. The fields of `Parameters` document the formulas."""
    d, layers, moe = config.embed_dim, config.num_layers, config.moe
    qk_width = config.query_width + config.key_width
    attention_gains = {"none": 0, "all_heads": qk_width, "per_head": 2 * config.head_width}
    attention_biases = {"none": 0, "qkv": qk_width + config.key_width, "all": qk_width + config.key_width + d}
    attention_vectors = attention_gains[config.attention_qk_norm] + attention_biases[config.attention_bias]
    expert = MLP_MATRICES[moe.activation] * d * moe.expert_dim if moe else 0
    feeding = len(config.feed_forward_layers)
    of_memories = [parameter for site in config.sites for parameter in site.parameters.values()]
    return Parameters(
        embedding=config.vocab_size * d,
        output=0 if config.tie_embeddings else d * config.vocab_size,
        attention=layers * 2 * d * qk_width,
        feed_forward=0 if moe else feeding * MLP_MATRICES[config.mlp] * d * config.mlp_dim,
        router=feeding * d * moe.num_experts if moe else 0,
        norms=(2 * layers + 1) * d + layers * attention_vectors,
        experts=feeding * moe.num_experts * expert if moe else 0,
        active_experts=feeding * moe.top_k * expert if moe else 0,
        memory=Counter(_groups(config)),
        memory_weights=sum(p.size for p in of_memories if p.role in ("matrix", "weights")),
        memory_matrices=sum(p.size for p in of_memories if p.role == "matrix"),
        memory_gains=sum(p.size for p in of_memories if p.role == "gain"),
        memory_tables=sum(
            readers[0].num_slots * readers[0].config.table.row_dim
            for readers in table_readers(config).values()
        ),
    )


def flops_per_token(config: ModelConfig, seq_len: int | None = None) -> Flops:
    """Returns the FLOPs of one token's forward pass; a training step takes about three times as many.

    Args:
        config: the model.
        seq_len: S, for the attention scores of a causal sequence. None leaves them out.
    """
    parameters, weight = count_parameters(config), _FLOPS_PER_WEIGHT
    memory: Counter[str] = Counter()
    for site in config.sites:
        for parameter in site.parameters.values():
            memory[parameter.group] += parameter.flops
    scores = 2 * config.query_width * (seq_len + 1) * config.num_layers if seq_len else 0
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
    """Returns the bytes of a slot in the table and in the optimizer's state, by the formulas of `RowBytes`.

    Args:
        table: widths and dtype of a row.
        train: moments of a row that are kept, and their dtype.
    """
    moments = sum(array.bytes(width) for array in train.row_arrays for width in table.arrays.values())
    return RowBytes(DTYPE_BYTES[table.dtype] * table.row_dim, moments)


def bytes_per_token(
    config: ModelConfig,
    batch_tokens: int,
    dtype_bytes: int | None = None,
    train: TrainConfig = _DEFAULT_TRAINING,
) -> Bytes:
    """Returns the bytes of parameters that a step over `batch_tokens` tokens reads; see `Bytes.per_token`.

    Experts and rows are counted like in the paper, as if no two tokens chose the same one until all are
    chosen. Choices that coincide read less.

    Args:
        config: the model.
        batch_tokens: tokens of the step: B·S in training and prefill, B in decoding.
        dtype_bytes: bytes of every stored number, such as 2 for weights served in bfloat16. None means as in
            training: float32, and tables in their own `dtype`.
        train: moments of a table's rows that are kept.

    Raises:
        UserError: no tokens.
    """
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "must be at least 1")
    parameters, moe = count_parameters(config), config.moe
    experts_read, table_read, moments_read = 0, 0, 0
    for readers in table_readers(config).values():
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
    """Returns the bytes of the optimizers' moments of all parameters and tables; see `moments_kept`."""
    of_tables = sum(
        readers[0].num_slots * row_bytes(readers[0].config.table, train).moments
        for readers in table_readers(config).values()
    )
    return _moment_bytes(count_parameters(config), train) + of_tables


def moments_kept(optimizer: str, matrices: int, others: int) -> int:
    """Returns the count of numbers that an optimizer of dense parameters keeps: moments, or a momentum.

    AdamW keeps two numbers per parameter and Lion one. Muon keeps one for the matrices that it
    orthogonalizes, and two for all other parameters.

    Args:
        optimizer: `TrainConfig.optimizer`.
        matrices: number of parameters that are weights of matrix products (`Parameters.matrices`).
        others: number of all other parameters whose gradient is a dense array.
    """
    return {"adamw": 2, "muon": 1, "lion": 1}[optimizer] * matrices + (1 + (optimizer != "lion")) * others


def _moment_bytes(parameters: Parameters, train: TrainConfig) -> int:
    """Returns the bytes of moments of parameters whose gradient is a dense array: all except for tables."""
    others = parameters.dense + parameters.experts - parameters.matrices
    return FLOAT32_BYTES * moments_kept(train.optimizer, parameters.matrices, others)


def _groups(config: ModelConfig) -> dict[str, int]:
    """Counts the dense parameters of memories by group."""
    groups: Counter[str] = Counter()
    for site in config.sites:
        for parameter in site.parameters.values():
            groups[parameter.group] += parameter.size
    return groups


def _rows_read(readers: tuple[MemorySite, ...], batch_tokens: int) -> int:
    """Counts the slots that a step reads from a table, each once.

    Memories with the same window together read at most that window. Windows that overlap together read at
    most the table.
    """
    windows = Counter(site.window for site in readers)
    reads = batch_tokens * readers[0].config.reads_per_token
    return min(sum(min(n * reads, window.size) for window, n in windows.items()), readers[0].num_slots)
