"""Costs of a decoding step against hand-worked numbers, and beside the other accounts of the same models."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.support import counted
from ultramem_jax.accounting import (
    PartCost,
    bytes_per_token,
    count_parameters,
    decode_cost,
    expected_experts,
    expected_rows,
    flops_per_token,
)
from ultramem_jax.accounting.decoding import expected_rows_read
from ultramem_jax.config import MoEConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import UserError
from ultramem_jax.presets import PRESETS, families, preset

# V 10, D 8, L 2, A 4 (2 wide), 2 heads of keys and values (4 wide together), gated MLP, F 6; 3 sequences.
PLAIN = replace(counted.PLAIN, tie_embeddings=True)
MOE = replace(PLAIN, moe=MoEConfig(num_experts=5, top_k=2, expert_dim=6, activation="swiglu"))
# Two memories: n 3 (N 9), m 2, H 2, d_k 4, d_v 4, E 4 (K 6), r 2, h 2, convolution 3 wide.
MEMORY = counted.MEMORY.changed(placement="1:1/2:2")
ULTRAMEM = replace(PLAIN, memories={"memory": MEMORY})
# Three memories with pre-values: n 4, m 2, H 1, a ring of 48 slots, windows of 4² at 0, 16 and 32.
RING = families.ultramem_v2(num_keys=4, top_m=2, key_dim=4, value_dim=4, pre_value_dim=6, share_ratio=0.5)


def all_rows_read(config, tokens):
    """Distinct rows that uniform reads find, over all tables."""
    return sum(expected_rows_read(readers, tokens) for readers in table_readers(config).values())


def cost(config, batch=3, cache_length=7, dtype="float32", cache_dtype="float32", **more):
    return decode_cost(config, batch, cache_length, dtype=dtype, cache_dtype=cache_dtype, **more)


def test_a_dense_model_by_hand():
    c = cost(PLAIN)
    # Query and output 8 x 8, key and value 8 x 4, a gain of 8.
    assert c.attention == PartCost(3 * 2 * 2 * 192, 4 * 2 * (192 + 8))
    # 7 positions, 8 wide in scores and sums; 4 wide as keys and as values.
    assert c.cache == PartCost(3 * 2 * 7 * 2 * 2 * 8, 3 * 2 * 7 * 2 * 4 * 4)
    assert c.feed_forward == PartCost(3 * 2 * 2 * 3 * 8 * 6, 4 * 2 * (144 + 8))
    assert c.logits == PartCost(3 * 2 * 80, 4 * (80 + 8))
    assert c.memory == c.memory_rows == PartCost(0, 0)
    assert c.experts == 0


def test_an_input_embedding_of_its_own_is_read_by_row():
    untied = replace(PLAIN, tie_embeddings=False)
    assert cost(untied).logits == PartCost(3 * 2 * 80, 4 * (80 + 8 + 3 * 8))
    assert cost(untied, batch=99).logits.bytes == 4 * (80 + 8 + 80)


def test_gains_of_attention_belong_to_attention():
    assert cost(replace(PLAIN, attention_qk_norm="all_heads")).attention.bytes == 4 * 2 * (192 + 8 + 8 + 4)


def test_experts_by_hand():
    c = cost(MOE)
    found = 5 * (1 - 0.6**3)  # 3.92 of 5
    assert c.experts == pytest.approx(found) == pytest.approx(3.92)
    # Per layer a router of 8 x 5, a gain, and the experts that were found; each token visits two.
    assert c.feed_forward == PartCost(3 * 2 * 2 * (40 + 2 * 144), round(4 * 2 * (40 + 8 + found * 144)))
    assert replace(c, experts=0, feed_forward=cost(PLAIN).feed_forward) == cost(PLAIN)


def test_measured_experts_take_the_place_of_the_expected():
    c = cost(MOE, experts=2.5)
    assert c.experts == 2.5
    assert c.feed_forward.bytes == 4 * 2 * (40 + 8 + 2.5 * 144)
    assert cost(PLAIN, experts=0.0) == cost(PLAIN)


def test_measured_rows_take_the_place_of_the_expected():
    c, measured = cost(ULTRAMEM), cost(ULTRAMEM, rows=5.5)
    assert measured.rows == 5.5 and 5.5 < c.rows == pytest.approx(all_rows_read(ULTRAMEM, 3))
    assert measured.memory_rows.bytes / 5.5 == pytest.approx(c.memory_rows.bytes / c.rows, rel=0.01)
    assert measured.memory_rows.flops == c.memory_rows.flops
    assert cost(PLAIN, rows=0.0) == cost(PLAIN)
    with pytest.raises(UserError, match=r"rows = 1\.0: must be at most the 0 reads"):
        cost(PLAIN, rows=1.0)


def test_the_expected_rows_of_a_single_read_may_round_to_more_than_one():
    memory = MEMORY.changed(num_heads=1, top_m=1, num_keys=5)
    one = cost(replace(PLAIN, memories={"memory": memory.changed(placement="1:2")}), batch=1)
    assert one.rows == pytest.approx(1)


def test_memories_by_hand():
    c = cost(ULTRAMEM)
    query, conv, keys, cores, gains, projection = 8 * 8, 8 * 3, 2 * 2 * 2 * 6 * 2, 2 * 2 * 4, 4 + 4, 16 * 8
    assert c.memory.bytes == 4 * 2 * (query + conv + keys + cores + gains + projection)
    # Best of both sides 2·2·r·K, exact grid 2·r²·m + 2·r·m², cores h·m·(2·r² + 2·r), for each of 2 heads.
    scoring = 2 * (2 * 2 * 2 * 6 + 2 * 4 * 2 + 2 * 2 * 4 + 2 * 2 * (2 * 4 + 2 * 2))
    assert c.memory.flops == 3 * 2 * (2 * (query + conv + keys + projection) + scoring)
    # 3·4 reads find 6.81 of 9 rows of 4 values.
    assert c.memory_rows == PartCost(3 * 2 * 2 * 4 * 4, round(2 * 9 * (1 - (8 / 9) ** 12) * 4 * 4))
    nothing = PartCost(0, 0)
    assert replace(c, rows=0.0, memory=nothing, memory_rows=nothing) == cost(PLAIN)


def test_keys_that_heads_share_are_read_once_and_scored_for_each():
    own, shared = cost(ULTRAMEM), cost(replace(PLAIN, memories={"memory": MEMORY.changed(share_keys=True)}))
    assert own.memory.bytes - shared.memory.bytes == 4 * 2 * 48
    assert own.memory.flops == shared.memory.flops


def test_weights_cache_and_tables_have_dtypes_of_their_own():
    full, half = cost(ULTRAMEM), cost(ULTRAMEM, dtype="bfloat16")
    for name in ("attention", "feed_forward", "memory", "logits"):
        assert half.parts[name].bytes * 2 == full.parts[name].bytes
    assert half.cache == full.cache and half.memory_rows == full.memory_rows
    assert cost(ULTRAMEM, cache_dtype="bfloat16").cache.bytes * 2 == full.cache.bytes
    stored = cost(replace(PLAIN, memories={"memory": MEMORY.changed(dtype="bfloat16")}))
    assert stored.memory_rows.bytes == pytest.approx(full.memory_rows.bytes / 2, abs=1)
    assert stored.memory == full.memory
    assert half.total.flops == full.total.flops


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_all_presets_agree_with_the_other_accounts(name, batch):
    config = preset(name)
    for dtype, size in (("float32", None), ("bfloat16", 2)):
        c, paper = cost(config, batch, 100, dtype=dtype), bytes_per_token(config, batch, size)
        chosen = c.memory_rows.bytes
        weights = count_parameters(config).experts * (size or 4)
        if config.moe:
            chosen += weights * c.experts / config.moe.num_experts
        assert c.total.bytes - c.cache.bytes - chosen == pytest.approx(paper.dense, abs=1)
        # Of one token the two are one; of more, some choices coincide.
        of_rows = bytes_per_token(config, batch).memory
        assert c.memory_rows.bytes <= of_rows + 1
        assert chosen - c.memory_rows.bytes <= paper.experts * (1 + 1e-9)
        if batch == 1:
            assert chosen - c.memory_rows.bytes == pytest.approx(paper.experts)
            assert c.memory_rows.bytes == pytest.approx(of_rows, rel=0.3)
        # S = 199 has 100 positions per token on average.
        assert c.total.flops == batch * flops_per_token(config, 199).total


def test_the_paper_counts_as_if_no_two_tokens_chose_the_same():
    config = preset("ultramem-151m-x12")
    few, many = 16, 1 << 20
    reads = few * 84
    assert all_rows_read(config, few) == pytest.approx(3 * reads, rel=1e-3)
    assert all_rows_read(config, many) == pytest.approx(3 * 1100**2)
    assert bytes_per_token(config, few).memory == 3 * reads * 512 * 4


@pytest.mark.parametrize(
    ("memory", "memories"),
    [
        (MEMORY, 2),
        (MEMORY.changed(sharing="all"), 2),
        (MEMORY.changed(sharing="ring"), 2),
        (MEMORY.changed(sharing="ring", share_ratio=0.9), 2),
        (RING, 3),
        (RING.changed(share_ratio=0.9), 3),
        (RING.changed(share_ratio=0.2), 3),
        (RING.changed(sharing="blocks", share_ratio=1 / 3), 3),
        (RING.changed(sharing="blocks", share_ratio=0.5), 4),
    ],
)
def test_rows_of_shared_tables_are_those_of_uniform_reads(memory, memories):
    config = replace(PLAIN, num_layers=memories, memories={"memory": memory})
    layout, tokens = config.sites[0].layout, 3
    reads = tokens * memory.reads_per_token
    # The chance that nobody reads a row, row by row.
    expected = 0.0
    for table, num_slots in enumerate(layout.num_slots):
        missed = np.ones(num_slots)
        for first, size in ((w.first, w.size) for w in layout.windows if w.table == table):
            missed[(first + np.arange(size)) % num_slots] *= (1 - 1 / size) ** reads
        expected += (1 - missed).sum()
    assert all_rows_read(config, tokens) == pytest.approx(expected)
    row = memory.table.row_dim * 4
    assert cost(config).memory_rows.bytes == round(expected * row)
    assert cost(config).memory_rows.bytes <= bytes_per_token(config, tokens).memory


def test_rows_of_memories_that_are_nowhere():
    config = replace(PLAIN, memories={"memory": MEMORY.changed(placement="none", sharing="ring")})
    assert cost(config) == cost(PLAIN)


def test_expected_choices():
    assert expected_experts(32, 2, 1) == pytest.approx(2)
    assert expected_experts(32, 2, 64) == pytest.approx(31.4856, abs=1e-4)
    assert expected_experts(4, 4, 1) == 4
    # One different choice a token is a uniform read.
    assert expected_experts(9, 1, 20) == pytest.approx(expected_rows(9, 20))


def test_the_floor_waits_for_the_slower_of_each_part():
    c = cost(ULTRAMEM)
    floors = c.part_floors(1e3, 1e2)
    assert list(floors) == ["attention", "cache", "feed_forward", "memory", "memory_rows", "logits"]
    assert floors["attention"] == max(2304 / 1e3, 1600 / 1e2) == 16
    assert floors["memory_rows"] == c.memory_rows.bytes / 1e2
    assert c.floor(1e3, 1e2) == pytest.approx(sum(floors.values()))
    assert c.bandwidth_floor(1e2) == pytest.approx(c.total.bytes / 1e2)
    assert c.floor(1.0, math.inf) == c.total.flops
    assert c.total.flops == sum(part.flops for part in c.parts.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch": 0}, "batch = 0: must be at least 1"),
        ({"cache_length": 0}, "cache_length = 0: must be at least 1"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"cache_dtype": "int8"}, "unknown cache_dtype 'int8'"),
        ({"experts": 6.0}, "experts = 6.0: must be at most 5"),
    ],
)
def test_bad_arguments_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        cost(MOE, **arguments)
