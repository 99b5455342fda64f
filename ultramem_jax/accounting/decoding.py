"""What one step of decoding must compute and move at least, by part, from a config alone.

A step takes one token of each of B sequences through the model. At small batches it waits for the memory:
every dense weight is read for a few tokens, and beside it what the tokens chose, experts or rows. The letters
are those of the axis legend in `ultramem_jax`; C is the length of the cache, b the bytes of a weight as it is
served, b_c of a number in the cache and b_t of one in a table, c the matrices of an MLP.

`bytes_per_token` counts what was chosen as the UltraMem paper does, min(k·B, X) experts and min(B·R, N)
rows: as if no two tokens chose the same until all are chosen. That is the most that a step can read. Here
stands what was measured (`experts`, `rows`), or else what is expected if the choices are uniform and know
nothing of each other, X·(1 - (1 - k/X)^B) experts and N·(1 - (1 - 1/N)^(B·R)) rows, which is never more: 16
tokens with 2 of 32 experts each read 20.6 of them instead of 32. The dense weights are the same in both.
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
    table_readers,
)
from ultramem_jax.accounting.parts import PartCost, expected_experts, expected_rows, floor_seconds
from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.errors import at_least, choice, require


@dataclass(frozen=True)
class DecodeCost:
    """The parts of one step of decoding, over all layers and memories.

    Left out are activations, which can stay in a cache, and the last inputs of convolutions. FLOPs are B
    times those of `flops_per_token`.
    """

    experts: float
    """Distinct experts that a layer reads: as measured, else expected. 0 without experts."""
    rows: float
    """Distinct rows that are read of all tables together: as measured, else expected. 0 without memories."""
    attention: PartCost
    """Projections and gains: b·L·(2·D² + 2·D·(kv width) + D) bytes, and the gains of `attention_qk_norm`."""
    cache: PartCost
    """4·B·C·D·L FLOPs, scores and weighted sums, and 2·B·C·(kv width)·L·b_c bytes: a token's own position is
    written, the others are read."""
    feed_forward: PartCost
    """MLPs, or the router and the experts that were chosen, b·L·(experts)·c·D·F bytes; the gain before it."""
    memory: PartCost
    """All of memories that is dense: what finds rows, and what is made of them. Bytes: each weight once.
    FLOPs: products with the weights, for product keys the scores of all K row and K column keys for every
    head and rank, and the choice among them. (Where full rank keys share a query, it may meet their sum
    instead, r times less to multiply; that is not counted.)"""
    memory_rows: PartCost
    """The rows that were chosen: 2·B·R·(d_v + d_p) FLOPs a memory, b_t·(distinct rows)·(d_v + d_p) bytes
    in all."""
    logits: PartCost
    """The output embedding and the last gain; of an input embedding of its own, the tokens' rows."""

    @property
    def total(self) -> PartCost:
        """The whole step."""
        return sum(self.parts.values(), PartCost(0, 0))

    @property
    def parts(self) -> dict[str, PartCost]:
        """The parts by name, in the order of the fields."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: part for name, part in named.items() if isinstance(part, PartCost)}

    def part_floors(self, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """The least seconds of each part, by name; each waits for the slower of computing and moving.

        Args:
            flops_per_second: the rate of matrix products in the served dtype.
            bytes_per_second: the bandwidth of the memory, which rows of a table are read at, too.
        """
        return {
            name: floor_seconds(part, flops_per_second, bytes_per_second) for name, part in self.parts.items()
        }

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least seconds of the step, its parts one after another; arguments as of `part_floors`."""
        return sum(self.part_floors(flops_per_second, bytes_per_second).values())

    def bandwidth_floor(self, bytes_per_second: float) -> float:
        """As `floor`, of the bytes alone: what a machine of endless FLOPs would need."""
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
    """The cost of one step that takes one token of each sequence through the model.

    Args:
        config: the model; tables are read in their own `dtype`.
        batch: B, sequences.
        cache_length: C, positions that a token attends to, its own among them.
        dtype: that weights are served in, `float32` or `bfloat16`.
        cache_dtype: of keys and values, one of the same.
        experts: distinct experts that a layer read on average, where it was measured; None for the expected.
        rows: the same of distinct rows, over all tables together.

    Raises:
        UserError: no sequences, no positions, another dtype, or more experts or rows than can be chosen.
    """
    at_least(1, batch=batch, cache_length=cache_length)
    choice("dtype", dtype, tuple(DTYPE_BYTES))
    choice("cache_dtype", cache_dtype, tuple(DTYPE_BYTES))
    parameters, moe = count_parameters(config), config.moe
    # A token of a causal sequence of S meets (S + 1)/2 positions on average: here C.
    flops = flops_per_token(config, 2 * cache_length - 1)
    layers, width = config.num_layers, config.embed_dim
    kv_width = config.num_kv_heads * (width // config.num_heads)

    attention = parameters.attention + parameters.norms - (layers + 1) * width
    feed_forward = parameters.feed_forward + parameters.router + layers * width
    of_memory = parameters.memory_dense
    # What is left of the dense weights that a step reads are embeddings and the last gain.
    embeddings = bytes_per_token(config, batch, dtype_bytes=1).dense - attention - feed_forward - of_memory

    chosen = 0.0
    if moe:
        chosen = expected_experts(moe.num_experts, moe.top_k, batch) if experts is None else experts
        require(chosen <= moe.num_experts, "experts", chosen, f"must be at most {moe.num_experts}")
    expert_weights = parameters.experts * chosen / moe.num_experts if moe else 0.0
    expected = [expected_rows_read(readers, batch) for readers in table_readers(config)]
    read = sum(expected) if rows is None else rows
    if rows is not None:  # of one read the expected number is one, give or take rounding
        reads = batch * sum(site.config.reads_per_token for site in config.sites)
        require(rows <= reads, "rows", rows, f"must be at most the {reads} reads")
    # Rows that were counted over all tables are shared out as the expected ones are.
    expected_bytes = sum(
        found * row_bytes(readers[0].config.table).table
        for found, readers in zip(expected, table_readers(config), strict=True)
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
            2 * batch * cache_length * kv_width * layers * DTYPE_BYTES[cache_dtype],
        ),
        feed_forward=cost(flops.feed_forward + flops.router, feed_forward + expert_weights),
        memory=cost(memory_flops, of_memory),
        memory_rows=PartCost(batch * flops.memory_lookup, round(row_read)),
        logits=cost(flops.logits, embeddings),
    )


def expected_rows_read(readers: tuple[MemorySite, ...], tokens: int) -> float:
    """Returns the distinct rows of a table that uniform reads of that many tokens find.

    Of a table that memories share, a row is found by those whose window it lies in; every memory reads its
    window uniformly.

    Args:
        readers: the memories that read the table.
        tokens: T; in decoding B.

    Returns:
        At most T·R a memory, and at most the slots of the windows.
    """
    reads, slots = tokens * readers[0].config.reads_per_token, readers[0].num_slots
    if len(readers) == 1 and readers[0].window.size == slots:
        return expected_rows(slots, reads)
    window, offsets = readers[0].window.size, [site.window.first for site in readers]
    # Between two edges of windows all rows have the same readers.
    edges = sorted({0, slots, *offsets, *((offset + window) % slots for offset in offsets)})
    found = 0.0
    for begin, end in pairwise(edges):
        number = sum((begin - offset) % slots < window for offset in offsets)
        found += (end - begin) / window * expected_rows(window, number * reads)
    return found
