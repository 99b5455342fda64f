"""Computes the least work and traffic of one decoding step, by part, given only a config.

A step takes one token of each of B sequences through the model. At small batches it waits for the device's
memory: it reads every dense weight for only a few tokens, and also the experts or rows that they choose. The
letters are those of the axis legend in `ultramem_jax`. In addition, C is the length of the cache, b the bytes
of a served weight, b_c the bytes of a number in the cache, b_t the bytes of a number in a table, and c the
number of matrices in an MLP.

`bytes_per_token` counts chosen experts and rows like the UltraMem paper: min(k·B, X) experts and min(B·R, N)
rows, as if no two tokens chose the same one until all are chosen. That is the most that a step can read. This
module takes the measured numbers (`experts`, `rows`) or else the expected ones. Choices that are uniform and
independent read X·(1 - (1 - k/X)^B) experts and N·(1 - (1 - 1/N)^(B·R)) rows in expectation. That is never
more: 16 tokens that choose 2 of 32 experts each read 20.6 experts instead of 32. Both ways count the same
dense weights.
"""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise

from ultramem_jax.accounting.model import (
    DTYPE_BYTES,
    bytes_per_token,
    count_parameters,
    flops_per_token,
    row_bytes,
)
from ultramem_jax.accounting.parts import PartCost, expected_experts, expected_rows, floor_seconds
from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import at_least, choice, require


@dataclass(frozen=True)
class DecodeCost:
    """Holds the cost of each part of one decoding step, over all layers and memories.

    It leaves out activations, which can stay in a cache, and the last inputs of convolutions. FLOPs are B
    times those of `flops_per_token`.
    """

    experts: float
    """Distinct experts that a layer reads, measured or else expected. 0 without experts."""
    rows: float
    """Distinct rows that the step reads from all tables together, measured or else expected. 0 without
    memories."""
    attention: PartCost
    """Projections and gains of attention: b·L·(2·D·A·d + 2·D·A_kv·d + D) bytes, and the gains of
    `attention_qk_norm` and the biases of `attention_bias`."""
    cache: PartCost
    """Attention over the cache: 4·B·C·A·d·L FLOPs of scores and weighted sums, and 2·B·C·A_kv·d·L·b_c
    bytes. The step writes the cache position of the token itself and reads the others."""
    feed_forward: PartCost
    """MLPs, or the router and the chosen experts, b·L·(experts)·c·D·F bytes; with the gain before them."""
    memory: PartCost
    """Dense parts of memories: addressers and readouts. Bytes: each weight once. FLOPs: products with the
    weights; for product keys the scores of all K row and K column keys for every head and rank, and the
    choice among them. (Where full rank keys share a query, the query may be multiplied with their sum
    instead, which takes r times fewer products. That is not counted.)"""
    memory_rows: PartCost
    """Chosen rows: 2·B·R·(d_v + d_p) FLOPs per memory, and b_t·(distinct rows)·(d_v + d_p) bytes in all."""
    logits: PartCost
    """Output embedding and last gain; if the input embedding is separate, also its rows of the tokens."""

    @property
    def total(self) -> PartCost:
        """Returns the cost of the whole step."""
        return sum(self.parts.values(), PartCost(0, 0))

    @property
    def parts(self) -> dict[str, PartCost]:
        """Returns the parts by name, in the order of the fields."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: part for name, part in named.items() if isinstance(part, PartCost)}

    def part_floors(self, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """Returns the least seconds of each part by name: of computing and moving, the slower one.

        Args:
            flops_per_second: rate of matrix products in the served dtype.
            bytes_per_second: bandwidth of the device's memory. Rows of a table are also read at this rate.
        """
        return {
            name: floor_seconds(part, flops_per_second, bytes_per_second) for name, part in self.parts.items()
        }

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Returns the least seconds of the step, its parts in sequence; arguments as in `part_floors`."""
        # `sum` rounds as the version of Python does: reports are the same with all of them.
        return math.fsum(self.part_floors(flops_per_second, bytes_per_second).values())

    def bandwidth_floor(self, bytes_per_second: float) -> float:
        """Returns the least seconds of the step if computing took no time: `floor` of only the bytes."""
        return self.floor(math.inf, bytes_per_second)


def decode_cost(
    config: ModelConfig,
    batch: int,
    cache_length: int,
    *,
    dtype: str,
    cache_dtype: str,
    experts: float | None = None,
    rows: float | None = None,
) -> DecodeCost:
    """Returns the cost of one step that takes one token of each sequence through the model.

    Args:
        config: the model. Tables are read in their own `dtype`.
        batch: B, sequences.
        cache_length: C, positions that a token attends to, including its own.
        dtype: dtype of the served weights, `float32` or `bfloat16`.
        cache_dtype: dtype of cached keys and values, `float32` or `bfloat16`.
        experts: measured mean of the distinct experts that a layer reads; None takes the expected number.
        rows: measured distinct rows, over all tables together; None takes the expected number.

    Raises:
        UserError: no sequences, no positions, another dtype, or more experts or rows than can be chosen.
    """
    at_least(1, batch=batch, cache_length=cache_length)
    choice("dtype", dtype, tuple(DTYPE_BYTES))
    choice("cache_dtype", cache_dtype, tuple(DTYPE_BYTES))
    parameters, moe = count_parameters(config), config.moe
    # A token of a causal sequence of length S attends to (S + 1)/2 positions on average. Here that must be C.
    flops = flops_per_token(config, 2 * cache_length - 1)
    layers, width = config.num_layers, config.embed_dim

    attention = parameters.attention + parameters.norms - (layers + 1) * width
    feed_forward = parameters.feed_forward + parameters.router + layers * width
    of_memory = parameters.memory_dense
    # The remaining dense weights that a step reads are embeddings and the last gain.
    embeddings = bytes_per_token(config, batch, dtype_bytes=1).dense - attention - feed_forward - of_memory

    chosen = 0.0
    if moe:
        chosen = expected_experts(moe.num_experts, moe.top_k, batch) if experts is None else experts
        require(chosen <= moe.num_experts, "experts", chosen, f"must be at most {moe.num_experts}")
    expert_weights = parameters.experts * chosen / moe.num_experts if moe else 0.0
    expected = [expected_rows_read(readers, batch) for readers in table_readers(config).values()]
    read = sum(expected) if rows is None else rows
    if rows is not None:  # only measured rows are checked: rounding may put the expected ones above the reads
        reads = batch * sum(site.config.reads_per_token for site in config.sites)
        require(rows <= reads, "rows", rows, f"must be at most the {reads} reads")
    # Measured rows are counted over all tables. They are divided among tables like the expected ones.
    expected_bytes = sum(
        found * row_bytes(readers[0].config.table).table
        for found, readers in zip(expected, table_readers(config).values(), strict=True)
    )
    row_read = expected_bytes * read / sum(expected) if expected else 0
    memory_flops = flops.memory.total() + flops.memory_scoring

    def cost(flops_of_token: int, weights: float) -> PartCost:
        return PartCost(batch * flops_of_token, round(DTYPE_BYTES[dtype] * weights))

    return DecodeCost(
        experts=chosen,
        rows=read,
        attention=cost(flops.attention, attention),
        cache=PartCost(
            batch * flops.attention_scores,
            2 * batch * cache_length * config.key_width * layers * DTYPE_BYTES[cache_dtype],
        ),
        feed_forward=cost(flops.feed_forward + flops.router, feed_forward + expert_weights),
        memory=cost(memory_flops, of_memory),
        memory_rows=PartCost(batch * flops.memory_lookup, round(row_read)),
        logits=cost(flops.logits, embeddings),
    )


def expected_rows_read(readers: tuple[MemorySite, ...], tokens: int) -> float:
    """Returns the expected number of distinct rows of a table that tokens read, uniformly at random.

    Every memory reads its window of the table uniformly. Memories that share a table can read the same row if
    it lies in the windows of several.

    Args:
        readers: the memories that read the table.
        tokens: T; in decoding B.

    Returns:
        At most T·R for each memory, and at most the slots of all windows.
    """
    reads, slots = tokens * readers[0].config.reads_per_token, readers[0].num_slots
    if len(readers) == 1 and readers[0].window.size == slots:
        return expected_rows(slots, reads)
    window, offsets = readers[0].window.size, [site.window.first for site in readers]
    # All rows between two neighbouring window edges have the same readers.
    edges = sorted({0, slots, *offsets, *((offset + window) % slots for offset in offsets)})
    found = 0.0
    for begin, end in pairwise(edges):
        number = sum((begin - offset) % slots < window for offset in offsets)
        found += (end - begin) / window * expected_rows(window, number * reads)
    return found
