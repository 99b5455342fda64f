"""Counts against hand-worked numbers and against the published tables."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from ultramem_jax import accounting
from ultramem_jax.config import MemoryConfig, ModelConfig, MoEConfig
from ultramem_jax.errors import UserError
from ultramem_jax.models.transformer import Transformer
from ultramem_jax.presets import PRESETS, preset

# Small enough to count by hand: V 10, D 8, L 2, A 4 (2 wide), 2 heads of keys and values, gated MLP, F 6.
PLAIN = ModelConfig(
    vocab_size=10,
    embed_dim=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp="swiglu",
    mlp_dim=6,
    tie_embeddings=False,
)
# One memory: n 3 (N 9), m 2, H 2, d_k 4, d_v 4, E 4 (K 6), r 2, h 2, convolution 3 wide.
MEMORY = MemoryConfig(
    placement="1:2",
    num_keys=3,
    top_m=2,
    num_heads=2,
    key_dim=4,
    value_dim=4,
    expansion=4,
    tucker_rank=2,
    num_cores=2,
    query_conv_width=3,
)
ULTRAMEM = replace(PLAIN, memory=MEMORY)
MOE = replace(PLAIN, moe=MoEConfig(num_experts=5, top_k=2, expert_dim=6, activation="swiglu"))


def test_parameters_of_a_dense_model_by_hand():
    p = accounting.count_parameters(PLAIN)
    assert (p.embedding, p.output) == (80, 80)
    assert p.attention == 2 * (64 + 2 * 8 * 4 + 64)
    assert p.feed_forward == 2 * 3 * 8 * 6
    assert p.norms == 5 * 8
    assert (p.dense, p.sparse, p.total) == (872, 0, 872)
    assert p.active == p.paper_dense == p.paper_total == 384 + 288


def test_parameters_of_a_memory_by_hand():
    p = accounting.count_parameters(ULTRAMEM)
    assert p.memory_queries == 8 * (2 * 1 * 4)
    assert p.memory_keys == 2 * 2 * 2 * 6 * 2  # sides, heads, ranks, keys, d_k / r
    assert p.memory_norms == 4 + 4
    assert p.memory_cores == 2 * 2 * 2 * 2  # cores, heads, r x r
    assert p.memory_projection == 4 * 4 * 8
    assert p.memory_conv == 8 * 3
    assert p.memory_tables == 9 * 4
    assert p.dense == 872 + 64 + 96 + 8 + 16 + 128 + 24
    assert (p.sparse, p.total) == (36, 1244)
    assert p.active == 672 + 64 + 96 + 128 + 24
    assert p.paper_dense == p.active + 16


@pytest.mark.parametrize(
    ("change", "component", "expected"),
    [
        ({"rank_keys": "full"}, "memory_keys", 192),  # every rank as wide as d_k
        ({"rank_keys": "full"}, "memory_norms", 8),  # ... under one gain
        ({"share_query": False}, "memory_queries", 128),
        ({"expansion": 1}, "memory_keys", 48),
        ({"expansion": 1}, "memory_projection", 32),
        ({"tucker_rank": 0, "num_cores": 1}, "memory_keys", 96),  # 2 sides, 2 heads, 6 keys 4 wide
        ({"tucker_rank": 0, "num_cores": 1}, "memory_cores", 0),
        ({"norm_query_key": False}, "memory_norms", 0),
        ({"query_conv_width": 0}, "memory_conv", 0),
        ({"expansion": 1, "project_values": False, "value_dim": 8}, "memory_projection", 0),
        ({"placement": "full"}, "memory_tables", 72),
        ({"placement": "none"}, "memory_keys", 0),
    ],
)
def test_every_switch_changes_what_it_should(change, component, expected):
    config = replace(PLAIN, memory=replace(MEMORY, **change))
    assert getattr(accounting.count_parameters(config), component) == expected


def test_parameters_of_experts_by_hand():
    p = accounting.count_parameters(MOE)
    assert p.feed_forward == 0
    assert p.router == 2 * 8 * 5
    assert p.experts == p.sparse == 2 * 5 * (3 * 8 * 6)
    assert p.active_experts == 2 * 2 * (3 * 8 * 6)
    assert p.active == 384 + 80 + 576
    assert p.total == 872 - 288 + 80 + 1440


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        ULTRAMEM,
        MOE,
        replace(ULTRAMEM, memory=replace(MEMORY, rank_keys="full", share_query=False, placement="full")),
        *(PRESETS[name] for name in sorted(PRESETS)),
    ],
    ids=["plain", "ultramem", "moe", "full ranks", *sorted(PRESETS)],
)
def test_the_count_is_that_of_the_model(config):
    # Shapes alone: nothing of a model's size is built. Tables live in a collection of their own.
    tokens = jnp.zeros((1, 8), jnp.int32)
    tree = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), tokens))
    size = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in tree.items()}
    p = accounting.count_parameters(config)
    assert size["params"] == p.dense + p.experts
    assert size.get("memory", 0) == p.memory_tables


def test_flops_by_hand():
    f = accounting.flops_per_token(ULTRAMEM, seq_len=7)
    assert (f.attention, f.feed_forward, f.router) == (768, 576, 0)
    assert (f.memory_queries, f.memory_keys, f.memory_projection) == (2 * (64 + 24), 192, 256)
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
    memory = MemoryConfig.pkm(placement="1:1", num_keys=3, top_m=2, num_heads=2, key_dim=4, value_dim=8)
    f = accounting.flops_per_token(replace(PLAIN, memory=memory))
    assert f.memory_queries == 2 * 8 * (2 * 2 * 4)
    assert f.memory_keys == 2 * (2 * 2 * 3 * 4)
    assert f.memory_projection == 0
    assert f.memory_scoring == 2 * (4 + 2)
    assert f.memory_lookup == 2 * 4 * 8


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


# The ablation of the UltraMem paper, table 2: what each rung changes, then dense (M), sparse (G), FLOPs (M).
LAYERS_151M = preset("dense-151m")
PKM = MemoryConfig.pkm(placement="6:6", num_keys=1224, key_dim=2448, value_dim=1024, num_heads=2, top_m=42)
LADDER = [
    ("PKM-151M-x10", {}, 173.01, 1.534, 346.06),
    ("rm softmax", {"softmax": False}, 173.01, 1.534, 346.06),
    (
        "half vdim + proj",
        {"project_values": True, "value_dim": 512, "num_keys": 1728},
        178.47,
        1.529,
        356.98,
    ),
    ("share query", {"share_query": True}, 173.46, 1.529, 346.96),
    (
        "split big mem & skip",
        {"placement": "3:5/6:8/9:11", "num_keys": 1000, "key_dim": 500},
        161.64,
        1.536,
        323.32,
    ),
    ("query/key LN", {"norm_query_key": True}, 161.64, 1.536, 323.54),
    ("IVE", {"expansion": 4}, 172.37, 1.536, 344.98),
    ("TDQKR", {"tucker_rank": 2}, 172.37, 1.536, 344.98),
    ("MCS", {"num_cores": 2}, 172.37, 1.536, 344.98),
    ("improved init", {"init": "paper"}, 172.37, 1.536, 344.98),
    ("value lr decay", {"value_lr_multiple": 10.0}, 172.37, 1.536, 344.98),
    ("query conv", {"query_conv_width": 4}, 172.38, 1.536, 345.02),
]


@pytest.mark.parametrize("rung", range(len(LADDER)), ids=[rung[0] for rung in LADDER])
def test_the_published_ablation_ladder(rung):
    changes = {name: value for step in LADDER[: rung + 1] for name, value in step[1].items()}
    config = replace(LAYERS_151M, memory=replace(PKM, **changes))
    _, _, dense, sparse, flops = LADDER[rung]
    p, f = accounting.count_parameters(config), accounting.flops_per_token(config)
    assert p.paper_dense / 1e6 == pytest.approx(dense, abs=0.015)
    assert p.sparse / 1e9 == pytest.approx(sparse, abs=0.0006)
    assert f.paper / 1e6 == pytest.approx(flops, rel=0.001)


def test_the_last_rung_is_ultramem_with_every_switch_on():
    changes = {name: value for step in LADDER for name, value in step[1].items()}
    shape = dict(placement="3:5/6:8/9:11", num_keys=1000, key_dim=500, value_dim=512, num_heads=2, top_m=42)
    assert replace(PKM, **changes) == MemoryConfig.ultramem(**shape)


def layers(embed_dim, num_layers):
    return ModelConfig(
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=16,
        num_kv_heads=16,
        mlp_dim=4 * embed_dim,
    )


MOE_1_6B = replace(layers(2048, 32), moe=MoEConfig(num_experts=34, top_k=2, expert_dim=4672))
ULTRAMEM_1_6B = replace(
    layers(2048, 32),
    memory=MemoryConfig.ultramem(
        placement="3:7/8:12/13:17/18:22/23:27/28:32",
        num_keys=1789,
        key_dim=800,
        value_dim=1024,
        num_heads=2,
        top_m=42,
    ),
)


@pytest.mark.parametrize(
    ("config", "billions", "gigaflops"),
    [
        (layers(1024, 12), 0.15, 0.30),
        (layers(1536, 24), 0.68, 1.36),
        (layers(2048, 32), 1.61, 3.22),  # printed as 3.21, which is 2 x 1.61 cut off
        (layers(4096, 32), 6.44, 12.88),
        (preset("moe-151m-2in32"), 2.04, 0.35),
        (preset("ultramem-151m-x12"), 2.03, 0.35),
        (replace(layers(1536, 24), moe=MoEConfig(num_experts=33, top_k=2, expert_dim=3570)), 8.95, 1.50),
        (MOE_1_6B, 21.36, 3.52),
        (ULTRAMEM_1_6B, 21.41, 3.50),
    ],
)
def test_the_published_models(config, billions, gigaflops):
    assert accounting.count_parameters(config).paper_total / 1e9 == pytest.approx(
        billions, rel=0.005, abs=0.005
    )
    assert accounting.flops_per_token(config).paper / 1e9 == pytest.approx(gigaflops, abs=0.01)


def test_a_dense_model_of_the_paper_has_12_l_d_squared_weights():
    assert accounting.count_parameters(preset("dense-151m")).paper_dense == 12 * 12 * 1024**2 == 150_994_944


def test_ultramem_touches_far_less_than_experts_at_equal_compute_and_size():
    def sparse(config, batch):
        return accounting.bytes_per_token(config, batch, dtype_bytes=2).sparse

    # One token: 32 layers x 2 experts x 2·2048·4672 weights; 6 memories x 84 values of 1024.
    assert sparse(MOE_1_6B, 1) == 2 * 32 * 2 * 2 * 2048 * 4672
    assert sparse(ULTRAMEM_1_6B, 1) == 2 * 6 * 84 * 1024
    # At 64 tokens all 34 experts of a layer are read, and 64 times as many values.
    assert sparse(MOE_1_6B, 64) == 17 * sparse(MOE_1_6B, 1)
    assert sparse(ULTRAMEM_1_6B, 64) == 64 * sparse(ULTRAMEM_1_6B, 1)
    assert sparse(MOE_1_6B, 64) / sparse(ULTRAMEM_1_6B, 64) == pytest.approx(630.3, abs=0.1)
    # They come together where every slot is read: N / 84 = 38,102 tokens.
    assert sparse(ULTRAMEM_1_6B, 131_072) / sparse(MOE_1_6B, 131_072) == pytest.approx(0.944, abs=0.001)


def test_slots_cost_no_token_anything_but_the_square_root():
    # Four times the slots: the keys double, all else stays, and so does what a step reads of the table.
    wide = replace(ULTRAMEM, memory=replace(MEMORY, num_keys=6))
    few, many = accounting.flops_per_token(ULTRAMEM), accounting.flops_per_token(wide)
    assert many.memory_keys == 2 * few.memory_keys
    assert many.memory_lookup == few.memory_lookup
    assert accounting.bytes_per_token(wide, 1).memory == accounting.bytes_per_token(ULTRAMEM, 1).memory


def test_count_table_lists_presets_in_aligned_columns():
    lines = accounting.count_table(["dense-151m", "ultramem-151m-x12"], 64).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "model",
        "dense params",
        "sparse params",
        "total params",
        "FLOPs/token (paper)",
        "FLOPs/token (all)",
        "bytes/token read at B = 64",
        "of these sparse",
    ]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    # 3 memories x 1100² x 512 values; 3 x 84 x 512 float32 read per token.
    assert cells[0] == "ultramem-151m-x12"
    assert (cells[2], cells[7]) == ("1,858,560,000", f"{3 * 84 * 512 * 4:,}")
    assert len({len(line) for line in lines}) == 1
    assert accounting.count_table([], 64) == ""


def test_count_table_refuses_an_unknown_preset():
    with pytest.raises(UserError, match="did you mean 'dense-tiny'"):
        accounting.count_table(["dense-tine"], 1)
