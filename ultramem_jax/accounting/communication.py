"""What devices send each other in a training step on a mesh, from its config alone.

Bytes are those that one device sends to others with the usual algorithms, which need the fewest: of an
all-gather, a reduce-scatter or an all-to-all (n-1)/n of the whole array that a group of n devices has in the
end, began with, or exchanges; of an all-reduce twice that. As many arrive. What a group exchanges does
not depend on the number of slots; only the gradient of the keys grows with it, as its square root.

The letters are those of the axis legend in `ultramem_jax`. Besides: G, the devices of a group that has each
table once and tokens of its own; P_s and P_w, the parts that rows and columns are cut into; T_g, the tokens
of a group in one micro-batch; b, the bytes of a value of `ModelConfig.dtype`. Left out are scalars, what
it takes to split the vocabulary over `tensor`, where that divides, and what Muon sends to orthogonalize
matrices that are split over `fsdp` or `tensor`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ultramem_jax.accounting.model import DTYPE_BYTES, FLOAT32_BYTES, MLP_MATRICES, count_parameters
from ultramem_jax.config import MemoryConfig, ModelConfig, RunConfig
from ultramem_jax.config import exchange_purposes as purposes
from ultramem_jax.config.exchange_shapes import AxisRoles, axis_roles, block_bytes, exchange_capacity
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.row_states import takes_means

_INT32_BYTES = 4


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step: what it is for, and what a device sends in it, over all memories."""

    name: str
    kind: str
    """`all-gather`, `all-reduce`, `reduce-scatter` or `all-to-all`."""
    axes: tuple[str, ...]
    """Of the mesh, along which its groups run."""
    moved_bytes: float


@dataclass(frozen=True)
class _Groups(AxisRoles):
    """The devices that share tokens and tables; axes of one device left out."""

    sizes: Mapping[str, int]
    tokens: tuple[str, ...]
    slots: tuple[str, ...]
    width: tuple[str, ...]
    experts: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig, sizes: Mapping[str, int]) -> "_Groups":
        return cls(sizes, **axis_roles(config, sizes))

    def size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.sizes[name] for name in axes)


class _Transfers:
    """Collects transfers; those without a group of devices, or without bytes, move nothing."""

    def __init__(self, groups: _Groups):
        self._groups = groups
        self.found: list[Transfer] = []

    def add(self, name: str, kind: str, axes: tuple[str, ...], array_bytes: float) -> None:
        """One collective over `axes`, of an array of that size when it is whole."""
        n = self._groups.size(axes)
        if n > 1 and array_bytes:
            moved = array_bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)
            self.found.append(Transfer(name, kind, axes, moved))

    def to_owners(self, name: str, array_bytes: float) -> None:
        """Numbers of each read or token, to all devices of a group."""
        self.add(name, "all-gather", self._groups.of_tokens(self._groups.owners), array_bytes)

    def to_tokens(self, name: str, array_bytes: float) -> None:
        """Sums of such numbers over a group, each to the device of its token."""
        self._sum(name, self._groups.owners, array_bytes)

    def columns_to_owners(self, name: str, array_bytes: float) -> None:
        """Vectors (T_g, d) to the owners of rows, columns to those of columns."""
        groups = self._groups
        share = groups.size(groups.of_tokens(groups.owners))
        if groups.of_tokens(groups.width):
            self.add(name, "all-to-all", groups.width, array_bytes / share)
        columns = array_bytes / groups.size(groups.width)
        self.add(name, "all-gather", groups.of_tokens(groups.slots), columns)

    def sums_to_tokens(self, name: str, array_bytes: float) -> None:
        """Sums (T_g, d) of each owner's rows and columns, to the devices of their tokens."""
        groups = self._groups
        columns = array_bytes / groups.size(groups.width)
        self._sum(name, groups.slots, columns)
        if groups.of_tokens(groups.width):
            split = groups.size(groups.of_tokens(groups.slots))
            self.add(name, "all-to-all", groups.width, columns / split)
        else:
            self.add(name, "all-gather", groups.width, array_bytes)

    def _sum(self, name: str, axes: tuple[str, ...], array_bytes: float) -> None:
        kind = "reduce-scatter" if self._groups.of_tokens(axes) else "all-reduce"
        self.add(name, kind, axes, array_bytes)


def step_transfers(config: RunConfig, sizes: Mapping[str, int]) -> tuple[Transfer, ...]:
    """The collectives of one training step.

    Per memory and micro-batch, of arrays of T_g tokens:

        slots, blocks      all-gather over G         T_g·R·(4 + 1), without blocks where there is one
        scores             all-gather over G         T_g·R·h·b
        pooled sums        reduce-scatter over P_s   T_g·E·d_v/P_w·b
                           all-to-all over P_w       T_g/P_s·E·d_v/P_w·b
        their cotangent    all-to-all over P_w       T_g/G·E·d_v·b
                           all-gather over P_s       T_g·E·d_v/P_w·b
        score gradients    reduce-scatter over G     T_g·R·h·b

    With pre-values also vectors and their gradient, as pooled sums with d_p in place of E·d_v, and products
    and their cotangent, as score gradients and scores with 1 in place of h.

    Scores of ones (Engram's) are constants, which nobody sends; nor have they gradients.

    Per memory and step, an all-gather over the axes that split tokens and not tables, to the devices that
    have the same part of a table: slots, blocks, scores and cotangents of all tokens, with d_v/P_w columns.
    With `batch_over_memory` off, tokens are on all devices of a group: nothing is gathered within it, and
    sums are all-reduces. A mean over each row (one second moment, or Adagrad's sum per row), with columns
    split, adds an all-reduce of 4 bytes a row.

    Dense parameters: an all-reduce of 4 bytes each (8 for a tied embedding, and for keys with a balance
    loss), once per micro-batch, over all axes that split tokens; with `fsdp` an all-gather before that.
    (Compilers for accelerators can make a reduce-scatter of that all-reduce, which sends less.) Experts:
    `ultramem_jax.layers.expert_parallel`. With `tensor`, sums of T·D·b over it, T a device's tokens: two per
    layer forward, three and one for each map into the MLP backward.

    Args:
        config: of the run.
        sizes: devices along each axis of the mesh; axes not named have one.
    """
    groups = _Groups.of(config, sizes)
    transfers = _Transfers(groups)
    micro_batches = config.train.grad_accumulation
    tokens = config.train.batch_size // micro_batches * config.data.seq_len
    for _ in range(micro_batches):
        for site in config.model.sites:
            _lookup(transfers, site, tokens // groups.size(groups.replicas))
        _parameters(transfers, groups, config.model)
        _tensor(transfers, groups, config.model, tokens // groups.size(groups.tokens))
        _experts(transfers, groups, config.model, tokens // groups.size(groups.tokens))
    for site in config.model.sites:
        _row_updates(transfers, groups, config, site, tokens * micro_batches)
    return _summed(transfers.found)


@dataclass(frozen=True)
class Exchange:
    """What a device sends in one memory's lookup, forward, by four ways; bytes."""

    slots: float
    """Ours: (P-1)·(t·R·(4 + 1 + h·b) + t·E·d_v·b), t the device's own tokens."""
    width: float
    """Ours: (P-1)·t·R·(4 + 1 + h·b) + (P-1)/P·t·E·d_v·b."""
    paper_number_wise: float
    """(P-1)/P·t·R·(4 + b·d_v): addresses to the owners, their rows back (UltraMem, appendix)."""
    paper_dimension_wise: float
    """(P-1)·t·R·(4 + b) + (P-1)/P·t·d_v·b: addresses and scores to all, pooled slices back."""


def exchange_bytes(site: MemorySite, tokens: int, parts: int) -> Exchange:
    """Returns what a device with its own tokens sends in a lookup, forward, with tables in P parts.

    Args:
        site: a memory of a model.
        tokens: t, of one device.
        parts: P.
    """
    memory, size = site.config, DTYPE_BYTES[site.around.dtype]
    reads, others = tokens * memory.reads_per_token, parts - 1
    addresses = others * reads * _address_bytes(memory)
    scores = others * reads * memory.varying_weights * size
    pooled = tokens * memory.num_blocks * memory.table.value_dim * size
    return Exchange(
        slots=addresses + scores + others * pooled,
        width=addresses + scores + others / parts * pooled,
        paper_number_wise=others / parts * reads * (_INT32_BYTES + size * memory.table.value_dim),
        paper_dimension_wise=others * reads * (_INT32_BYTES + size)
        + others / parts * tokens * memory.table.value_dim * size,
    )


def _address_bytes(memory: MemoryConfig) -> int:
    """Of a slot and, if there are several, its block."""
    return _INT32_BYTES + block_bytes(memory.num_blocks)


def _lookup(transfers: _Transfers, site: MemorySite, tokens: int) -> None:
    """Forward and backward of one memory, for T_g tokens."""
    memory, size = site.config, DTYPE_BYTES[site.around.dtype]
    reads = tokens * memory.reads_per_token
    scores = reads * memory.varying_weights * size
    pooled = tokens * memory.num_blocks * memory.table.value_dim * size
    vectors = tokens * memory.table.pre_value_dim * size
    transfers.to_owners(purposes.READS_TO_OWNERS, reads * _address_bytes(memory))
    transfers.to_owners(purposes.SCORES_TO_OWNERS, scores)
    transfers.sums_to_tokens(purposes.POOLED_SUMS_TO_TOKENS, pooled)
    transfers.columns_to_owners(purposes.COTANGENTS_TO_OWNERS, pooled)
    transfers.to_tokens(purposes.SCORE_GRADIENTS_TO_TOKENS, scores)
    if memory.table.pre_value_dim:
        transfers.columns_to_owners(purposes.INPUTS_TO_OWNERS, vectors)
        transfers.to_tokens(purposes.PRODUCTS_TO_TOKENS, reads * size)
        transfers.to_owners(purposes.PRODUCT_COTANGENTS_TO_OWNERS, reads * size)
        transfers.sums_to_tokens(purposes.INPUT_GRADIENTS_TO_TOKENS, vectors)


def _row_updates(
    transfers: _Transfers, groups: _Groups, config: RunConfig, site: MemorySite, tokens: int
) -> None:
    """What one memory's table needs of the tokens of other groups, in a step."""
    memory, table, size = site.config, site.config.table, DTYPE_BYTES[site.around.dtype]
    if config.train.table_gradient != "row_sparse":
        _dense_table(transfers, groups, config, site)
        return
    reads = tokens * memory.reads_per_token
    parts = groups.size(groups.width)
    gathered = reads * (_address_bytes(memory) + memory.varying_weights * size)
    gathered += tokens * memory.num_blocks * table.value_dim // parts * size
    if table.pre_value_dim:
        gathered += tokens * table.pre_value_dim // parts * size + reads * size
    transfers.add(purposes.READS_AND_COTANGENTS_TO_REPLICAS, "all-gather", groups.replicas, gathered)
    if takes_means(config.train.row_arrays):
        # For every place in the chunks of reads that owners work on, of values and of pre-values.
        means = reads / groups.size(groups.slots) * FLOAT32_BYTES * len(table.arrays)
        transfers.add(purposes.MEANS_OVER_COLUMNS, "all-reduce", groups.width, means)


def _dense_table(transfers: _Transfers, groups: _Groups, config: RunConfig, site: MemorySite) -> None:
    """The dense way: from each memory the gradient of its table's part, for the replicas of that."""
    table = site.num_slots * site.config.table.row_dim * FLOAT32_BYTES / groups.size(groups.owners)
    for _ in range(config.train.grad_accumulation):
        transfers.add(purposes.GRADIENTS_OF_TABLES, "all-reduce", groups.replicas, table)
    reads = config.train.batch_size * config.data.seq_len * site.config.reads_per_token
    transfers.add(purposes.READS_TO_REPLICAS, "all-gather", groups.replicas, reads * _INT32_BYTES)


def _parameters(transfers: _Transfers, groups: _Groups, model: ModelConfig) -> None:
    """Dense parameters, and experts that are on every device of a token axis."""
    count = count_parameters(model)
    # Tied, the embedding has a gradient as an input and one as an output, summed over devices one by one.
    twice = count.embedding if model.tie_embeddings else 0
    in_parts = count.attention + count.feed_forward
    whole = count.dense + twice - in_parts
    gradients = FLOAT32_BYTES * (whole + in_parts / groups.sizes.get("tensor", 1))
    transfers.add(purposes.GRADIENTS_OF_PARAMETERS, "all-reduce", groups.tokens, gradients)
    again = sum(site.config.address.balance_numbers(site) for site in model.sites)
    transfers.add(purposes.BALANCE_LOSSES, "all-reduce", groups.tokens, FLOAT32_BYTES * again)
    of_memories = [parameter for site in model.sites for parameter in site.parameters.values()]
    never_split = sum(parameter.size for parameter in of_memories if not any(parameter.axes))
    split = FLOAT32_BYTES * (count.dense - count.norms - never_split)
    if groups.sizes.get("fsdp", 1) > 1:
        transfers.add(purposes.PARAMETERS_FOR_THE_STEP, "all-gather", ("fsdp",), split)


def _tensor(transfers: _Transfers, groups: _Groups, model: ModelConfig, tokens: int) -> None:
    """The partial sums of attention and MLPs, forward and backward, for a device's own tokens."""
    if groups.sizes.get("tensor", 1) == 1:
        return
    sums = model.num_layers * (1 + 3)  # attention: its output; the inputs of query, key and value
    if model.moe is None:
        sums += len(model.feed_forward_layers) * MLP_MATRICES[model.mlp]  # likewise, all but one backward
    sums *= tokens * model.embed_dim * DTYPE_BYTES[model.dtype]
    transfers.add("sums of heads and inner widths", "all-reduce", ("tensor",), sums)


def _experts(transfers: _Transfers, groups: _Groups, model: ModelConfig, tokens: int) -> None:
    """Of all layers, for a device's own tokens."""
    moe, size = model.moe, DTYPE_BYTES[model.dtype]
    if moe is None:
        return
    tensor = groups.sizes.get("tensor", 1)
    weights = count_parameters(model).experts * FLOAT32_BYTES / groups.size(groups.experts) / tensor
    others = tuple(name for name in groups.tokens if name not in groups.experts)
    transfers.add(purposes.GRADIENTS_OF_EXPERTS, "all-reduce", others, weights)
    if groups.sizes.get("fsdp", 1) > 1:
        transfers.add(purposes.PARAMETERS_FOR_THE_STEP, "all-gather", ("fsdp",), weights)
    owners, layers = groups.size(groups.experts), len(model.feed_forward_layers)
    if groups.of_tokens(groups.experts):
        capacity = exchange_capacity(tokens * moe.top_k, owners)
        rows = layers * owners * capacity * model.embed_dim * size
        transfers.add(purposes.LOADS_OF_EXPERTS, "all-to-all", groups.experts, layers * moe.num_experts * 4)
        for way in ("tokens to experts", "results to tokens"):
            transfers.add(way, "all-to-all", groups.experts, 2 * rows)  # forward and backward
    partial = () if groups.of_tokens(groups.experts) else groups.experts
    if tensor > 1:
        partial += ("tensor",)
    sums = layers * tokens * (2 * model.embed_dim * size + moe.top_k * FLOAT32_BYTES)
    transfers.add(purposes.SUMS_OVER_EXPERTS, "all-reduce", partial, sums)


def _summed(found: list[Transfer]) -> tuple[Transfer, ...]:
    """One transfer for each name, kind and group of axes."""
    total: dict[tuple[str, str, tuple[str, ...]], float] = {}
    for transfer in found:
        key = transfer.name, transfer.kind, transfer.axes
        total[key] = total.get(key, 0) + transfer.moved_bytes
    return tuple(Transfer(*key, moved) for key, moved in total.items())
