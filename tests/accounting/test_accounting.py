"""Counts against hand-worked numbers and against the published tables."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests.support.counted import MEMORY, PLAIN
from ultramem_jax import accounting
from ultramem_jax.config import MoEConfig
from ultramem_jax.errors import UserError
from ultramem_jax.models.transformer import Transformer
from ultramem_jax.presets import PRESETS, families, preset

ULTRAMEM = replace(PLAIN, memories={"memory": MEMORY})
# Three Memory layers in the manner of UltraMemV2: n 4, d_k 4, d_v 4, d_p 6, m 2, H 1, r 2, h 2, a ring of
# 3·4² = 48 slots, of which each memory reads half: the largest square within 24 is 4², so K is 4.
RING = replace(
    PLAIN,
    num_layers=3,
    memories={
        "memory": families.ultramem_v2(
            num_keys=4, top_m=2, key_dim=4, value_dim=4, pre_value_dim=6, share_ratio=0.5
        )
    },
)
# PEER, one memory: n 3, d_k 4, d_v = d_p = D 8, m 2, 3 heads with queries of their own and common keys.
PEER = replace(
    PLAIN,
    memories={
        "memory": families.peer(
            placement="1:1", num_keys=3, top_m=2, num_heads=3, key_dim=4, value_dim=8, pre_value_dim=8
        )
    },
)
# Memory+, two memories: n 3, d_k 4, d_v = D 8, m 2, H 2, one table and a gate.
MEMORY_PLUS = replace(
    PLAIN,
    memories={"memory": families.memory_plus(num_keys=3, top_m=2, num_heads=2, key_dim=4, value_dim=8)},
)
MOE = replace(PLAIN, moe=MoEConfig(num_experts=5, top_k=2, expert_dim=6, activation="swiglu"))


def test_parameters_of_a_dense_model_by_hand():
    p = accounting.count_parameters(PLAIN)
    assert (p.embedding, p.output) == (80, 80)
    assert p.attention == 2 * (64 + 2 * 8 * 4 + 64)
    assert p.feed_forward == 2 * 3 * 8 * 6
    assert p.norms == 5 * 8
    assert (p.dense, p.sparse, p.total) == (872, 0, 872)
    assert p.active == p.paper_dense == p.paper_total == 384 + 288
    assert p.active_total == p.total  # in OLMoE's way of counting embeddings and gains are active


def test_gains_of_attention_are_as_wide_as_all_its_heads():
    p = accounting.count_parameters(replace(PLAIN, attention_qk_norm="all_heads"))
    assert p.norms == 5 * 8 + 2 * (8 + 4)  # 4 heads of queries and 2 of keys, 2 wide
    assert p.active == 384 + 288
    # 4 heads of queries and 2 of keys, now 6 wide: 8 × 6 × (4 + 2 + 2 + 4) weights, gains of 6, all biases.
    p = accounting.count_parameters(
        replace(PLAIN, head_dim=6, attention_qk_norm="per_head", attention_bias="all")
    )
    assert p.attention == 2 * 8 * 6 * 12
    assert p.norms == 5 * 8 + 2 * (6 + 6 + 24 + 12 + 12 + 8)


def test_parameters_of_a_memory_by_hand():
    p = accounting.count_parameters(ULTRAMEM)
    assert p.memory["queries"] == 8 * (2 * 1 * 4)
    assert p.memory["keys"] == 2 * 2 * 2 * 6 * 2  # sides, heads, ranks, keys, d_k / r
    assert p.memory["norms"] == 4 + 4
    assert p.memory["cores"] == 2 * 2 * 2 * 2  # cores, heads, r x r
    assert p.memory["projection"] == 4 * 4 * 8
    assert p.memory["conv"] == 8 * 3
    assert p.memory_tables == 9 * 4
    assert p.dense == 872 + 64 + 96 + 8 + 16 + 128 + 24
    assert (p.sparse, p.total) == (36, 1244)
    assert p.active == 672 + 64 + 96 + 128 + 24
    assert p.paper_dense == p.active + 16


@pytest.mark.parametrize(
    ("change", "component", "expected"),
    [
        ({"rank_keys": "full"}, "keys", 192),  # every rank as wide as d_k
        ({"rank_keys": "full"}, "norms", 8),  # ... under one gain
        ({"share_query": False}, "queries", 128),
        ({"expansion": 1}, "keys", 48),
        ({"expansion": 1}, "projection", 32),
        ({"tucker_rank": 0, "num_cores": 1}, "keys", 96),  # 2 sides, 2 heads, 6 keys 4 wide
        ({"tucker_rank": 0, "num_cores": 1}, "cores", 0),
        ({"norm_query": False}, "norms", 4),
        ({"norm_keys": False}, "norms", 4),
        ({"norm_query": False, "norm_keys": False}, "norms", 0),
        ({"share_keys": True}, "keys", 48),
        ({"rank_keys": "full", "query_per_rank": True}, "queries", 128),
        ({"rank_keys": "full", "query_per_rank": True, "share_query": False}, "queries", 256),
        ({"rank_keys": "full", "query_per_rank": True}, "keys", 192),
        ({"sum_blocks": True}, "projection", 32),
        ({"sum_blocks": True}, "keys", 96),
        ({"gate": True, "sum_blocks": True}, "gate", 32),
        ({}, "gate", 0),
        ({"pre_value_dim": 6}, "pre_projection", 48),
        ({"pre_value_dim": 6}, "memory_tables", 90),  # 9 slots of 4 + 6
        ({"pre_value_dim": 8, "project_pre_values": False}, "pre_projection", 0),
        ({"placement": "full", "sharing": "all"}, "memory_tables", 36),
        ({"placement": "full", "sharing": "all"}, "keys", 192),
        ({"placement": "full", "sharing": "ring"}, "memory_tables", 72),
        # The whole ring of 18 slots: its largest square is 4², so that K is 2·4 in both memories.
        ({"placement": "full", "sharing": "ring"}, "keys", 256),
        ({"placement": "full", "sharing": "ring", "share_ratio": 0.5}, "keys", 192),
        ({"placement": "full", "sharing": "blocks", "share_ratio": 0.5}, "memory_tables", 72),
        ({"placement": "none", "sharing": "ring"}, "memory_tables", 0),
        ({"query_conv_width": 0}, "conv", 0),
        ({"expansion": 1, "project_values": False, "value_dim": 8}, "projection", 0),
        ({"placement": "full"}, "memory_tables", 72),
        ({"placement": "none"}, "keys", 0),
    ],
)
def test_every_switch_changes_what_it_should(change, component, expected):
    config = replace(PLAIN, memories={"memory": MEMORY.changed(**change)})
    found = accounting.count_parameters(config)
    assert (found.memory_tables if component == "memory_tables" else found.memory[component]) == expected


def test_parameters_of_a_ring_by_hand():
    p = accounting.count_parameters(RING)
    assert p.memory["queries"] == 3 * 8 * (2 * 1 * 4)
    assert p.memory["keys"] == 3 * 2 * 1 * 2 * 4 * 4  # memories, sides, heads, ranks, K, d_k
    assert p.memory["norms"] == 3 * (4 + 4)
    assert p.memory["cores"] == 3 * 2 * 1 * 2 * 2
    assert p.memory["projection"] == 3 * 4 * 8
    assert p.memory["pre_projection"] == 3 * 8 * 6
    assert p.memory["conv"] == p.memory["gate"] == 0
    assert p.memory_tables == 48 * (4 + 6)
    layers = 3 * (192 + 144)
    assert p.active == layers + 192 + 192 + 96 + 144
    assert p.active_total == p.dense == p.active + 24 + 24 + 160 + 7 * 8


def test_parameters_of_a_gated_shared_table_by_hand():
    p = accounting.count_parameters(MEMORY_PLUS)
    assert p.memory["queries"] == 2 * 8 * (2 * 2 * 4)  # each of the 2 heads has its own
    assert p.memory["keys"] == 2 * 2 * 2 * 3 * 4
    assert p.memory["projection"] == p.memory["gate"] == 2 * 8 * 8
    assert p.memory_tables == 9 * 8
    assert p.active == 672 + 256 + 96 + 128 + 128


def test_parameters_of_experts_of_width_one_by_hand():
    p = accounting.count_parameters(PEER)
    assert p.memory["queries"] == 8 * (2 * 3 * 4)
    assert p.memory["keys"] == 2 * 3 * 4  # one set for three heads
    assert p.memory["norms"] == 4  # only of queries
    assert p.memory["projection"] == p.memory["pre_projection"] == 0
    assert p.memory_tables == 9 * (8 + 8)


def test_parameters_of_experts_by_hand():
    p = accounting.count_parameters(MOE)
    assert p.feed_forward == 0
    assert p.router == 2 * 8 * 5
    assert p.experts == p.sparse == 2 * 5 * (3 * 8 * 6)
    assert p.active_experts == 2 * 2 * (3 * 8 * 6)
    assert p.active == 384 + 80 + 576
    assert p.active_total == p.active + 160 + 40  # and embeddings, and gains
    assert p.total == 872 - 288 + 80 + 1440


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        ULTRAMEM,
        MOE,
        RING,
        PEER,
        MEMORY_PLUS,
        replace(
            ULTRAMEM,
            memories={"memory": MEMORY.changed(rank_keys="full", share_query=False, placement="full")},
        ),
        replace(
            RING, memories={"memory": RING.memory.changed(query_per_rank=True, expansion=4, num_heads=2)}
        ),
        replace(PLAIN, attention_qk_norm="all_heads"),
        replace(PLAIN, attention_qk_norm="per_head", attention_bias="all", head_dim=6),
        replace(PLAIN, attention_bias="qkv", head_dim=4),
        replace(PLAIN, memories={"memory": MEMORY.changed(placement="instead@1/before@2")}),
        replace(MOE, memories={"memory": MEMORY.changed(placement="instead@2")}),
        *(PRESETS[name] for name in sorted(PRESETS)),
    ],
    ids=[
        *("plain", "ultramem", "moe", "ring", "peer", "memory+"),
        *(
            "full ranks",
            "query per rank",
            "attention norms",
            "wide heads, biases",
            "wide heads, biases of keys",
            "instead",
            "instead of experts",
            *sorted(PRESETS),
        ),
    ],
)
def test_the_count_is_that_of_the_model(config):
    # Only shapes: nothing of a model's size is built. Tables live in a collection of their own.
    tokens = jnp.zeros((1, 8), jnp.int32)
    tree = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), tokens))
    size = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in tree.items()}
    p = accounting.count_parameters(config)
    assert size["params"] == p.dense + p.experts
    assert size.get("memory", 0) == p.memory_tables


def test_flops_by_hand():
    f = accounting.flops_per_token(ULTRAMEM, seq_len=7)
    assert (f.attention, f.feed_forward, f.router) == (768, 576, 0)
    assert dict(f.memory) == {"queries": 2 * 64, "conv": 2 * 24, "keys": 192, "projection": 256}
    assert f.paper == 1968 == 2 * accounting.count_parameters(ULTRAMEM).active
    # A head: 2 sides x 6 keys x (2 products + 2 sums, the first onto zero) to find candidates; the core times
    # m columns and the rows times that; 2 cores x 2 cells x (4 + 2 products and as many sums).
    assert f.memory_scoring == 2 * (2 * 6 * 4 + (2 * 4 * 2 + 2 * 2 * 4) + 2 * 2 * (8 + 4))
    assert f.memory_lookup == 2 * (2 * 2) * 4
    assert f.logits == 2 * 8 * 10
    assert (
        f.attention_scores == 2 * 4 * 8 * 4
    )  # layers, 4 FLOPs per width and position, (7 + 1) / 2 positions
    assert f.total == 1968 + 256 + 32 + 160 + 256
    assert accounting.flops_per_token(ULTRAMEM).total == f.total - 256


def test_flops_of_product_keys_add_scores_without_cores():
    memory = families.pkm(placement="1:1", num_keys=3, top_m=2, num_heads=2, key_dim=4, value_dim=8)
    f = accounting.flops_per_token(replace(PLAIN, memories={"memory": memory}))
    assert f.memory["queries"] == 2 * 8 * (2 * 2 * 4)
    assert f.memory["keys"] == 2 * (2 * 2 * 3 * 4)
    assert f.memory["projection"] == 0
    assert f.memory_scoring == 2 * (4 + 2)
    assert f.memory_lookup == 2 * 4 * 8


def test_flops_of_a_ring_by_hand():
    f = accounting.flops_per_token(RING)
    assert (f.memory["queries"], f.memory["keys"]) == (2 * 192, 2 * 192)
    assert (f.memory["projection"], f.memory["pre_projection"], f.memory["gate"]) == (2 * 96, 2 * 144, 0)
    assert f.paper == 2 * accounting.count_parameters(RING).active
    # 2 reads: their pre-values are 6 wide and meet the projection of x, their values 4 wide.
    assert f.memory_lookup == 3 * 2 * 2 * (6 + 4)
    assert f.memory_scoring == 3 * (2 * 4 * 4 + (2 * 4 * 2 + 2 * 2 * 4) + 2 * 2 * (8 + 4))
    assert f.matched == f.paper + f.memory_scoring + f.memory_lookup


def test_flops_of_a_gate_by_hand():
    f = accounting.flops_per_token(MEMORY_PLUS)
    assert f.memory["gate"] == f.memory["projection"] == 2 * 128
    assert f.paper == 2 * accounting.count_parameters(MEMORY_PLUS).active


def test_keys_that_heads_share_are_stored_once_and_scored_by_every_head():
    p, f = accounting.count_parameters(PEER), accounting.flops_per_token(PEER)
    assert p.memory["keys"] == 24
    assert f.memory["keys"] == 3 * 2 * 24
    assert f.paper == 2 * p.active + 2 * 2 * 24  # two heads more than the weights tell
    assert f.memory_lookup == 2 * (3 * 2) * (8 + 8)


def test_flops_of_experts_by_hand():
    f = accounting.flops_per_token(MOE)
    assert (f.feed_forward, f.router) == (2 * 576, 2 * 80)
    assert f.paper == f.matched == 768 + 1152 + 160


@pytest.mark.parametrize(
    ("batch", "rows", "embedding_rows"),
    [(1, 4, 1), (2, 8, 2), (3, 9, 3), (1000, 9, 10)],  # reads 4 a token until all 9 slots are read
)
def test_bytes_of_a_memory_saturate_at_its_slots(batch, rows, embedding_rows):
    b = accounting.bytes_per_token(ULTRAMEM, batch, dtype_bytes=2)
    assert b.memory == b.sparse == 2 * rows * 4
    assert b.dense == 2 * (1208 - (10 - embedding_rows) * 8)
    assert b.step == b.dense + b.memory
    assert b.per_token == b.step / batch
    assert b.optimizer == 2 * 4 * (1208 + rows * 4)  # two float32 moments, whatever the weights are served in


@pytest.mark.parametrize(
    ("config", "batch", "rows"),
    [
        (RING, 1, 3 * 2),
        (RING, 7, 3 * 14),
        (RING, 8, 48),  # 3 windows of 16 are all of the ring
        (RING, 1000, 48),
        # Of the whole ring each memory reaches 6² slots; together they read no more than its 48.
        (replace(RING, memories={"memory": RING.memory.changed(share_ratio=1.0)}), 8, 48),
        (replace(RING, memories={"memory": RING.memory.changed(share_ratio=1.0)}), 1000, 48),
        (MEMORY_PLUS, 1, 2 * 4),
        (MEMORY_PLUS, 2, 9),  # one table for both, so 9 slots and not 2·8
        (replace(MEMORY_PLUS, memories={"memory": MEMORY_PLUS.memory.changed(sharing="none")}), 2, 2 * 8),
        (replace(MEMORY_PLUS, memories={"memory": MEMORY_PLUS.memory.changed(sharing="none")}), 3, 2 * 9),
    ],
)
def test_bytes_of_a_shared_table_by_hand(config, batch, rows):
    assert accounting.bytes_per_token(config, batch).memory == 4 * rows * config.memory.table.row_dim


def test_bytes_of_blocks_are_those_of_each_window():
    # 4 memories in 2 groups; a table of 4·9 slots in 2 windows of 18, whose largest square is 16.
    memory = MEMORY_PLUS.memory.changed(sharing="blocks", share_ratio=0.5)
    blocks = replace(MEMORY_PLUS, num_layers=4, memories={"memory": memory})
    rows = [accounting.bytes_per_token(blocks, batch).memory // (4 * 8) for batch in (1, 2, 3, 1000)]
    assert rows == [2 * 2 * 4, 2 * 16, 2 * 16, 2 * 16]


@pytest.mark.parametrize(("batch", "experts"), [(1, 2), (2, 4), (3, 5), (1000, 5)])
def test_bytes_of_experts_saturate_at_their_number(batch, experts):
    b = accounting.bytes_per_token(MOE, batch)
    assert b.experts == b.sparse == 4 * 2 * experts * 144
    assert b.optimizer == 8 * (664 + 1440)  # every expert has a gradient


def test_tied_embeddings_are_read_whole_for_the_logits():
    tied = replace(PLAIN, tie_embeddings=True)
    assert accounting.bytes_per_token(tied, 1).dense == 4 * (872 - 80)


def test_optimizer_keeps_two_moments_of_everything():
    assert accounting.optimizer_bytes(ULTRAMEM) == 8 * 1244


def test_an_empty_batch_is_refused():
    with pytest.raises(UserError, match="batch_tokens = 0"):
        accounting.bytes_per_token(PLAIN, 0)


def test_the_last_rung_is_ultramem_with_every_switch_on():
    shape = dict(placement="3:5/6:8/9:11", num_keys=1000, key_dim=500, value_dim=512, num_heads=2, top_m=42)
    assert preset("ladder-12-query-conv").memory == families.ultramem(**shape)


def test_a_dense_model_of_the_paper_has_12_l_d_squared_weights():
    assert accounting.count_parameters(preset("dense-151m")).paper_dense == 12 * 12 * 1024**2 == 150_994_944


def test_ultramem_touches_far_less_than_experts_at_equal_compute_and_size():
    moe, ultramem = preset("moe-1.6b-2in34"), preset("ultramem-1.6b-x12")

    def sparse(config, batch):
        return accounting.bytes_per_token(config, batch, dtype_bytes=2).sparse

    # One token: 32 layers x 2 experts x 2·2048·4672 weights; 6 memories x 84 values of 1024.
    assert sparse(moe, 1) == 2 * 32 * 2 * 2 * 2048 * 4672
    assert sparse(ultramem, 1) == 2 * 6 * 84 * 1024
    # At 64 tokens all 34 experts of a layer are read, and 64 times as many values.
    assert sparse(moe, 64) == 17 * sparse(moe, 1)
    assert sparse(ultramem, 64) == 64 * sparse(ultramem, 1)
    assert sparse(moe, 64) / sparse(ultramem, 64) == pytest.approx(630.3, abs=0.1)
    # They come together where every slot is read: N / 84 = 38,102 tokens.
    assert sparse(ultramem, 131_072) / sparse(moe, 131_072) == pytest.approx(0.944, abs=0.001)


def test_slots_cost_no_token_anything_but_the_square_root():
    # Four times the slots: the keys double, all else stays, and so does what a step reads of the table.
    wide = replace(ULTRAMEM, memories={"memory": MEMORY.changed(num_keys=6)})
    few, many = accounting.flops_per_token(ULTRAMEM), accounting.flops_per_token(wide)
    assert many.memory["keys"] == 2 * few.memory["keys"]
    assert many.memory_lookup == few.memory_lookup
    assert accounting.bytes_per_token(wide, 1).memory == accounting.bytes_per_token(ULTRAMEM, 1).memory
