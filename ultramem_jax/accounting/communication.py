"""Counts the bytes that devices of a mesh send each other in a training step, given only the run's config.

Bytes are those that one device sends with the usual algorithms, which need the fewest. In a group of n
devices, an all-gather, a reduce-scatter or an all-to-all sends (n-1)/n of the whole array: the result of an
all-gather, the input of a reduce-scatter, and all that an all-to-all exchanges. An all-reduce sends twice
that share. Each device receives as many bytes as it sends. The exchange of a group does not depend on the
number of slots. Only the gradient of the keys grows with it, as its square root.

The letters are those of the axis legend in `ultramem_jax`. In addition, G is the number of devices of a group
that holds each table once and has its own tokens; P_s and P_w are the parts that rows and columns are cut
into; T_g is the tokens of a group in one micro-batch; b is the bytes of a value of `ModelConfig.dtype`. The
counts leave out scalars, the traffic of a vocabulary that is split over `tensor` (where `tensor` divides it),
and the bytes that Muon sends to orthogonalize matrices that are split over `fsdp` or `tensor`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ultramem_jax.accounting.model import DTYPE_BYTES, FLOAT32_BYTES, MLP_MATRICES, count_parameters
from ultramem_jax.config import MemoryConfig, ModelConfig, RunConfig
from ultramem_jax.config import exchange_purposes as purposes
from ultramem_jax.config.exchange_shapes import AxisRoles, axis_roles, block_bytes, exchange_capacity
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import table_readers
from ultramem_jax.config.row_states import takes_means

_INT32_BYTES = 4


@dataclass(frozen=True)
class Transfer:
    """Describes one kind of collective of a step: its purpose, and a device's bytes over all memories."""

    name: str
    """Purpose of the collective, such as "reads to owners"."""
    kind: str
    """Kind of the collective: `all-gather`, `all-reduce`, `reduce-scatter` or `all-to-all`."""
    axes: tuple[str, ...]
    """Mesh axes along which its groups of devices run."""
    moved_bytes: float
    """Bytes that one device sends."""


@dataclass(frozen=True)
class Groups(AxisRoles):
    """Describes the groups of devices that share tokens and tables. Axes of one device are left out."""

    sizes: Mapping[str, int]
    """Devices along each mesh axis."""
    tokens: tuple[str, ...]
    slots: tuple[str, ...]
    width: tuple[str, ...]
    experts: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig, sizes: Mapping[str, int]) -> "Groups":
        """Returns the groups of a run on a mesh of these sizes."""
        return cls(sizes, **axis_roles(config, sizes))

    def size(self, axes: tuple[str, ...]) -> int:
        """Returns the number of devices of a group along the axes."""
        return math.prod(self.sizes[name] for name in axes)


class _Transfers:
    """Collects transfers. It drops those within one device and those without bytes."""

    def __init__(self, groups: Groups):
        self._groups = groups
        self.found: list[Transfer] = []

    def add(self, name: str, kind: str, axes: tuple[str, ...], array_bytes: float) -> None:
        """Adds one collective over `axes`; `array_bytes` is the size of the whole array."""
        n = self._groups.size(axes)
        if n > 1 and array_bytes:
            moved = array_bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)
            self.found.append(Transfer(name, kind, axes, moved))

    def to_owners(self, name: str, array_bytes: float) -> None:
        """Adds a transfer of numbers of each read or token to all devices of a group."""
        self.add(name, "all-gather", self._groups.of_tokens(self._groups.owners), array_bytes)

    def to_tokens(self, name: str, array_bytes: float) -> None:
        """Adds a transfer of such numbers, summed over a group, to the devices of their tokens."""
        self._sum(name, self._groups.owners, array_bytes)

    def columns_to_owners(self, name: str, array_bytes: float) -> None:
        """Adds a transfer of vectors (T_g, d) to the owners of rows; column owners get only their columns."""
        groups = self._groups
        share = groups.size(groups.of_tokens(groups.owners))
        if groups.of_tokens(groups.width):
            self.add(name, "all-to-all", groups.width, array_bytes / share)
        columns = array_bytes / groups.size(groups.width)
        self.add(name, "all-gather", groups.of_tokens(groups.slots), columns)

    def sums_to_tokens(self, name: str, array_bytes: float) -> None:
        """Adds a transfer of sums (T_g, d) of each owner's rows and columns to the devices of the tokens."""
        groups = self._groups
        columns = array_bytes / groups.size(groups.width)
        self._sum(name, groups.slots, columns)
        if groups.of_tokens(groups.width):
            split = groups.size(groups.of_tokens(groups.slots))
            self.add(name, "all-to-all", groups.width, columns / split)
        else:
            self.add(name, "all-gather", groups.width, array_bytes)

    def _sum(self, name: str, axes: tuple[str, ...], array_bytes: float) -> None:
        """Adds a sum over `axes`: a reduce-scatter if they split tokens, else an all-reduce."""
        kind = "reduce-scatter" if self._groups.of_tokens(axes) else "all-reduce"
        self.add(name, kind, axes, array_bytes)


def step_transfers(config: RunConfig, sizes: Mapping[str, int]) -> tuple[Transfer, ...]:
    """Returns the collectives of one training step.

    Every memory has these in every micro-batch, on arrays of T_g tokens:

        slots, blocks      all-gather over G         T_g·R·(4 + 1), without blocks where there is one
        scores             all-gather over G         T_g·R·h·b
        pooled sums        reduce-scatter over P_s   T_g·E·d_v/P_w·b
                           all-to-all over P_w       T_g/P_s·E·d_v/P_w·b
        their cotangent    all-to-all over P_w       T_g/G·E·d_v·b
                           all-gather over P_s       T_g·E·d_v/P_w·b
        score gradients    reduce-scatter over G     T_g·R·h·b

    With pre-values, vectors and their gradient are also sent, like pooled sums with d_p in place of E·d_v.
    Products and their cotangent are sent like score gradients and scores with 1 in place of h.

    Scores that are all ones (Engram's) are constants. They are not sent, and they have no gradients.

    Every memory has an all-gather in every step, over the axes that split tokens but not tables, to the
    devices that hold the same part of a table: slots, blocks, scores and cotangents of all tokens, with
    d_v/P_w columns. With `batch_over_memory` off, all devices of a group have the same tokens. Then nothing
    is gathered within the group, and sums are all-reduces. A mean over each row (one second moment, or
    Adagrad's sum per row) adds an all-reduce of 4 bytes per row if columns are split. A selection of rows
    (`train.slots_per_step`, t) adds an all-gather of 4·t·P_s bytes per table over P_s: scores of the best.

    Dense parameters have an all-reduce of 4 bytes each (8 for a tied embedding, and for keys with a balance
    loss), once per micro-batch, over all axes that split tokens. With `fsdp` an all-gather precedes it.
    (Compilers for accelerators can replace that all-reduce by a reduce-scatter, which sends less.) For
    experts see `ultramem_jax.layers.expert_parallel`. With `tensor` there are sums of T·D·b over that axis,
    where T is the tokens of a device: two per layer in the forward pass; in the backward pass three, and one
    for each map into the MLP.

    Args:
        config: the run.
        sizes: devices along each axis of the mesh. An axis that is not named has one device.
    """
    groups = Groups.of(config, sizes)
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
    _selections(transfers, groups, config, tokens * micro_batches)
    return _summed(transfers.found)


@dataclass(frozen=True)
class Exchange:
    """Compares the bytes that a device sends in one memory's forward lookup under four partitions."""

    slots: float
    """Bytes with our partition `slots`: (P-1)·(t·R·(4 + 1 + h·b) + t·E·d_v·b), where t is the device's own
    tokens."""
    width: float
    """Bytes with our partition `width`: (P-1)·t·R·(4 + 1 + h·b) + (P-1)/P·t·E·d_v·b."""
    paper_number_wise: float
    """Bytes with the paper's number-wise partition (UltraMem, appendix): (P-1)/P·t·R·(4 + b·d_v), for
    addresses to the owners and rows back."""
    paper_dimension_wise: float
    """Bytes with the paper's dimension-wise partition: (P-1)·t·R·(4 + b) + (P-1)/P·t·d_v·b, for addresses and
    scores to all devices and pooled slices back."""


def exchange_bytes(site: MemorySite, tokens: int, parts: int) -> Exchange:
    """Returns the bytes that a device with its own tokens sends in a forward lookup of a table in P parts.

    Args:
        site: a memory of a model.
        tokens: t, tokens of one device.
        parts: P.
    """
    memory, size = site.config, DTYPE_BYTES[site.context.dtype]
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
    """Returns the bytes of a read's slot and, if there are several blocks, of its block."""
    return _INT32_BYTES + block_bytes(memory.num_blocks)


def _lookup(transfers: _Transfers, site: MemorySite, tokens: int) -> None:
    """Adds the transfers of one memory's forward and backward pass for T_g tokens."""
    memory, size = site.config, DTYPE_BYTES[site.context.dtype]
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
    transfers: _Transfers, groups: Groups, config: RunConfig, site: MemorySite, tokens: int
) -> None:
    """Adds the transfers that bring tokens of other groups to the owners of one memory's table, in a step."""
    memory, table, size = site.config, site.config.table, DTYPE_BYTES[site.context.dtype]
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
        # One mean for every position in the chunks of reads that owners process, of values and of pre-values.
        means = reads / groups.size(groups.slots) * FLOAT32_BYTES * len(table.arrays)
        transfers.add(purposes.MEANS_OVER_COLUMNS, "all-reduce", groups.width, means)


def _selections(transfers: _Transfers, groups: Groups, config: RunConfig, tokens: int) -> None:
    """Adds the scores that owners of rows exchange to select the rows that a step may change."""
    parts = groups.size(groups.slots)
    for sites in table_readers(config.model).values():
        reads = sum(tokens * site.config.reads_per_token for site in sites)
        best = min(config.train.slots_per_step, reads, sites[0].num_slots // parts + 1)
        transfers.add(purposes.SELECTION_OF_ROWS, "all-gather", groups.slots, parts * best * FLOAT32_BYTES)


def _dense_table(transfers: _Transfers, groups: Groups, config: RunConfig, site: MemorySite) -> None:
    """Adds the transfers of dense table gradients: each memory's part, summed over the part's replicas."""
    table = site.num_slots * site.config.table.row_dim * FLOAT32_BYTES / groups.size(groups.owners)
    for _ in range(config.train.grad_accumulation):
        transfers.add(purposes.GRADIENTS_OF_TABLES, "all-reduce", groups.replicas, table)
    reads = config.train.batch_size * config.data.seq_len * site.config.reads_per_token
    transfers.add(purposes.READS_TO_REPLICAS, "all-gather", groups.replicas, reads * _INT32_BYTES)


def _parameters(transfers: _Transfers, groups: Groups, model: ModelConfig) -> None:
    """Adds the transfers of dense parameters."""
    count = count_parameters(model)
    # A tied embedding has one gradient as input and one as output. Devices sum the two separately.
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


def _tensor(transfers: _Transfers, groups: Groups, model: ModelConfig, tokens: int) -> None:
    """Adds the sums over `tensor` in attention and MLPs, forward and backward, for a device's own tokens."""
    if groups.sizes.get("tensor", 1) == 1:
        return
    sums = model.num_layers * (1 + 3)  # attention: its output; the inputs of query, key and value
    if model.moe is None:
        sums += len(model.feed_forward_layers) * MLP_MATRICES[model.mlp]  # likewise, all but one backward
    sums *= tokens * model.embed_dim * DTYPE_BYTES[model.dtype]
    transfers.add("sums of heads and inner widths", "all-reduce", ("tensor",), sums)


def _experts(transfers: _Transfers, groups: Groups, model: ModelConfig, tokens: int) -> None:
    """Adds the transfers of the experts of all layers, for a device's own tokens."""
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
        # There and back, forward and backward.
        transfers.add(purposes.TOKENS_TO_EXPERTS, "all-to-all", groups.experts, 4 * rows)
    partial = () if groups.of_tokens(groups.experts) else groups.experts
    if tensor > 1:
        partial += ("tensor",)
    sums = layers * tokens * (2 * model.embed_dim * size + moe.top_k * FLOAT32_BYTES)
    transfers.add(purposes.SUMS_OVER_EXPERTS, "all-reduce", partial, sums)


def _summed(found: list[Transfer]) -> tuple[Transfer, ...]:
    """Merges the transfers of the same name, kind and axes."""
    total: dict[tuple[str, str, tuple[str, ...]], float] = {}
    for transfer in found:
        key = transfer.name, transfer.kind, transfer.axes
        total[key] = total.get(key, 0) + transfer.moved_bytes
    return tuple(Transfer(*key, moved) for key, moved in total.items())
