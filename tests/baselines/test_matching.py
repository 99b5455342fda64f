"""Counterparts of an UltraMem model have its compute and its sparse parameters, or there is an error."""

from dataclasses import replace

import pytest

from ultramem_jax import accounting
from ultramem_jax.baselines import matching
from ultramem_jax.baselines.allocation import with_table_share
from ultramem_jax.baselines.matching import COMBINED, SYSTEMS, differences, match, match_all, verify_match
from ultramem_jax.baselines.systems import reads_per_token
from ultramem_jax.config import ModelConfig, MoEConfig
from ultramem_jax.config.memory_parts import TableLayout, Window
from ultramem_jax.errors import UserError
from ultramem_jax.presets import PRESETS, families

TINY = PRESETS["ultramem-tiny"]
DEMO = ModelConfig(
    embed_dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=512,
    memories={
        "memory": families.ultramem(
            placement="1:2", num_keys=256, top_m=16, num_heads=2, key_dim=32, value_dim=64
        )
    },
)


def with_memory(config, **changes):
    return replace(config, memories={"memory": config.memory.changed(**changes)})


def test_dense_by_hand():
    # The memory costs 2·(8,192 + 65,536 + 32,768 + 512) = 214,016 in weights, 11,264 in scoring (2 heads of
    # 4·2·512 + 2·4·16 + 2·2·256 + 2·16·12) and 4,096 in lookups. An MLP's unit costs 2·2·(2·128) = 1,024.
    assert (214_016 + 11_264 + 4_096) / 1_024 == 224.0
    dense = match(DEMO, "dense")
    assert dense == replace(DEMO, memories={}, mlp_dim=512 + 224)


def test_moe_by_hand():
    # ultramem-151m-x12: number × width of the experts is 1,858,560,000 / (12·2·1024) = 75,625. The FLOPs left
    # by attention, 347,555,424 - 2·12·4·1024², are 2·12·1024 × (number + 2·2·width), so that sum is 10,045.9:
    # width 2,503.8 and number 30.2.
    base = PRESETS["ultramem-151m-x12"]
    moe = match(base, "moe").moe
    assert (moe.num_experts, moe.expert_dim, moe.top_k) == (30, 2512, 2)
    assert moe.num_experts * moe.expert_dim == pytest.approx(75_625, rel=0.005)


def test_experts_that_mostly_route_match_only_where_no_others_do(monkeypatch):
    wide, narrow = (
        replace(TINY, memories={}, moe=MoEConfig(num_experts=number, top_k=2, expert_dim=width))
        for number, width in ((30, 400), (4000, 3))
    )
    monkeypatch.setitem(matching.BASELINES, "moe", lambda base, step: iter([wide, narrow]))
    for of_wide, of_narrow, best in ((0.019, 0.001, wide), (0.021, 0.019, narrow), (0.003, 0.001, wide)):
        off = {30: of_wide, 4000: of_narrow}
        monkeypatch.setattr(
            matching, "differences", lambda base, other, off=off: {"x": off[other.moe.num_experts]}
        )
        assert match(TINY, "moe", tolerance=0.02) == best


def test_pkm_by_hand():
    # ultramem-151m-x12: √(1,858,560,000 / 1024) = 1347.2 keys per side; 3·2·42 reads over 2 heads.
    base = PRESETS["ultramem-151m-x12"]
    pkm = match(base, "pkm")
    assert pkm.memory == families.pkm(
        placement="6:6",
        num_keys=1347,
        top_m=126,
        num_heads=2,
        key_dim=pkm.memory.address.key_dim,
        value_dim=1024,
    )
    assert pkm.mlp_dim == base.mlp_dim
    # Memories of 2·(7,525,248·3 weights) less lookup and scoring, over 2·(4·1024 + 4·1347) a key dimension.
    wanted = (2 * 3 * 7_525_248 + 258_048 + 156_000 - 2 * 252 * 1024 - 2 * (126**2 + 126)) / 18_968
    assert pkm.memory.address.key_dim == pytest.approx(wanted, abs=8)


def test_fine_grained_moe_by_hand():
    # ultramem-tiny: number × width is 13,107,200 / (4·3·128) = 8,533.3. The FLOPs left by attention,
    # 2,101,248 - 2·4·4·128², are 2·4·128 × (number + 3·8·width), so that sum is 1,540: width 58.0 and
    # number 147.1.
    moe = match(TINY, "moe-fine").moe
    assert (moe.num_experts, moe.top_k, moe.expert_dim) == (147, 8, 58)
    assert (moe.activation, moe.normalize_gates) == ("swiglu", False)


def test_improved_pkm_is_pkm_but_for_norms_and_rate():
    pkm, improved = match(TINY, "pkm").memory, match(TINY, "pkm-improved").memory
    assert improved == pkm.changed(norm_query=True, norm_keys=True, value_lr_multiple=4.0)


def test_memory_plus_by_hand():
    # √(13,107,200 / 128) = 320 keys per side; 64 reads over 2 memories of 2 heads. A key dimension costs
    # 2·2·2·2·(128 + 320) = 7,168 FLOPs. The base's memories cost 493,568 in weights, 26,624 in scoring and
    # 8,192 in lookups; gate and projection take 131,072 of that, scoring 1,088, lookups 16,384.
    wanted = (2 * 2 * 123_392 + 2 * 2 * 6_656 + 8_192 - 131_072 - 2 * 2 * 272 - 16_384) / 7_168
    plus = match(TINY, "memory-plus")
    assert plus.mlp_dim == TINY.mlp_dim
    assert plus.memory == families.memory_plus(
        placement="1:1/3:3",
        num_keys=320,
        top_m=16,
        num_heads=2,
        key_dim=round(wanted),
        value_dim=128,
        value_lr_multiple=4.0,
    )
    assert plus.sites[0].layout == TableLayout((320**2,), (Window(0, 0, 320**2),) * 2)


def test_memory_plus_sits_at_a_regular_interval():
    # Three memories: each in the middle of four of the twelve layers.
    plus = match(PRESETS["ultramem-151m-x12"], "memory-plus")
    assert plus.memory.placement == "2:2/6:6/10:10"
    assert len(plus.sites[0].layout.num_slots) == 1


def test_peer_by_hand():
    # √(13,107,200 / 256) = 226.3 keys per side; 64 reads over 8 heads, values and pre-values of width D.
    peer = match(TINY, "peer")
    assert peer.memory == families.peer(
        placement="2:2",
        num_keys=226,
        top_m=8,
        num_heads=8,
        key_dim=peer.memory.address.key_dim,
        value_dim=128,
        pre_value_dim=128,
    )
    # A key dimension costs 2·8·2·(128 + 226) = 11,328; scoring takes 8·(64 + 8), lookups 2·64·256.
    wanted = (2 * 2 * 123_392 + 2 * 2 * 6_656 + 8_192 - 576 - 32_768) / 11_328
    assert peer.memory.address.key_dim == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize(("reads", "heads"), [(64, 8), (252, 7), (36, 6), (50, 5), (44, 4), (22, 8)])
def test_heads_of_peer_divide_the_reads(reads, heads):
    peer = match(with_memory(TINY, placement="2:2", num_heads=2, top_m=reads // 2), "peer").memory.address
    assert (peer.num_heads, peer.top_m) == (heads, reads // heads)


def test_ultramem_v2_by_hand():
    # A ring of 4·226² slots of 32 + 32 numbers; each of the four memories reads half of it, 319² of 102,152
    # slots, from its own start; 64 reads over 4 memories.
    v2 = match(TINY, "ultramem-v2")
    assert v2.memory == families.ultramem_v2(
        placement="full",
        num_keys=226,
        top_m=16,
        num_heads=1,
        key_dim=32,
        value_dim=32,
        pre_value_dim=32,
        share_ratio=0.5,
    )
    layout = v2.sites[0].layout
    assert layout.num_slots == (4 * 226**2,)
    assert v2.memory.address.num_virtual_keys(v2.sites[0]) == 319
    assert [window.first for window in layout.windows] == [0, 226**2, 2 * 226**2, 3 * 226**2]
    # Its memories are cheaper than the base's, and the MLPs get what is left: 24 units of 2·2·4·128 FLOPs.
    assert v2.mlp_dim == 512 + 24


def test_ultramem_v2_in_one_layer_reads_its_whole_table():
    v2 = match(replace(with_memory(DEMO, placement="1:1"), num_layers=1), "ultramem-v2")
    assert v2.memory.table.share_ratio == 1
    assert v2.sites[0].window.size == v2.sites[0].num_slots


def test_the_base_stands_for_itself():
    assert match(DEMO, "ultramem") is DEMO
    assert list(match_all(DEMO)) == list(SYSTEMS)
    assert SYSTEMS[0] == "ultramem"


BASES = {
    "tiny": TINY,
    "demo": DEMO,
    "151m": PRESETS["ultramem-151m-x12"],
    "gated": replace(TINY, mlp="swiglu", mlp_dim=344),
    "memory everywhere": with_memory(TINY, placement="full"),
    "few slots": with_memory(TINY, num_keys=160),
    "wide keys": with_memory(TINY, rank_keys="full", key_dim=256),
    "narrow keys": replace(
        TINY,
        memories={
            "memory": families.pkm(placement="2:2", num_keys=320, num_heads=1, key_dim=2, value_dim=128)
        },
    ),
    "grouped queries": replace(TINY, num_kv_heads=2, tie_embeddings=False),
}


@pytest.mark.parametrize("name", BASES)
def test_counterparts_match_within_the_tolerance(name):
    base = BASES[name]
    family = match_all(base)
    verify_match(family, 0.02)
    target = accounting.flops_per_token(base)
    for system, config in family.items():
        flops = accounting.flops_per_token(config)
        assert flops.matched == pytest.approx(target.matched, rel=0.02), system
        # What a system does not decide stays as it was.
        assert (flops.attention, flops.logits) == (target.attention, target.logits)
        if system != "dense":
            sparse = accounting.count_parameters(config).sparse
            assert sparse == pytest.approx(accounting.count_parameters(base).sparse, rel=0.02), system
        if config.memory:
            assert reads_per_token(config) == reads_per_token(base), system


def test_the_mlp_takes_what_keys_cannot():
    wide, narrow = match(BASES["wide keys"], "pkm"), match(BASES["narrow keys"], "pkm")
    assert (wide.memory.address.key_dim, narrow.memory.address.key_dim) == (4 * 128, 8)
    assert wide.mlp_dim > 512 and narrow.mlp_dim < 512


def test_reads_per_token_by_hand():
    assert reads_per_token(TINY) == 2 * 2 * 16
    assert reads_per_token(match(TINY, "dense")) == 0


def test_pkm_reads_no_more_than_its_keys_allow():
    # 4 memories × 2 heads × 16 reads would be 64 for each of the two heads.
    base = with_memory(TINY, placement="full", num_keys=40, value_dim=64)
    pkm = match(base, "pkm")
    assert pkm.memory.address.num_keys == 57  # √(4·1600·64/128) = 56.6
    assert pkm.memory.address.top_m == 57


def test_a_window_reads_no_more_than_its_keys_allow():
    # 4·n²·64 numbers are 6,400·64 of the base: n 40, in windows of 56² of 3,200 slots; 600 reads would be 150
    # for each of the four memories.
    base = with_memory(TINY, num_keys=80, expansion=4, top_m=150, placement="1:4", value_dim=64)
    v2 = match(base, "ultramem-v2")
    assert (v2.memory.address.num_keys, v2.sites[0].window.size) == (40, 56**2)
    assert v2.memory.address.top_m == 56


def test_activation_of_the_experts_is_the_mlps():
    assert match(BASES["gated"], "moe").moe.activation == "swiglu"


def test_impossible_matches_say_what_failed():
    # 2·8²·96 = 12,288 sparse parameters are 96 values of width 128: the nearest square is 100, 4.2 % off.
    few = with_memory(TINY, num_keys=8, top_m=8, value_dim=96)
    with pytest.raises(UserError, match=r"no pkm model .* within 2.0%; .*sparse parameters off by 4.2%"):
        match(few, "pkm")
    # As two experts in each of 4 layers they are 6 units wide: nowhere near the compute.
    with pytest.raises(UserError, match=r"no moe model .* FLOPs per token off by"):
        match(few, "moe")
    # ... and 48 values and pre-values of width 128: 7² are 2.1 % off.
    with pytest.raises(UserError, match=r"no peer model .* within 2.0%; .*sparse parameters off by 2.1%"):
        match(few, "peer")
    # Four memories with keys of D/4 cost more than one head with keys 2 wide and hardly an MLP.
    with pytest.raises(UserError, match="no ultramem-v2 model is as small as the base"):
        match(replace(BASES["narrow keys"], mlp_dim=8), "ultramem-v2")


def test_only_a_model_with_a_memory_has_counterparts():
    with pytest.raises(UserError, match="must have a memory"):
        match(ModelConfig(), "moe")
    with pytest.raises(UserError, match="did you mean 'dense'"):
        match(DEMO, "dens")
    with pytest.raises(UserError, match="did you mean 'ultramem-v2'"):
        match(DEMO, "ultramem-v3")


def test_differences_are_shares_of_the_base():
    wider = replace(DEMO, mlp_dim=1024)
    # 512 units at 1,024 FLOPs more than 1,015,808.
    assert differences(DEMO, wider) == {
        "FLOPs per token": pytest.approx(524_288 / 1_015_808),
        "sparse parameters": 0.0,
    }


def test_verify_match_names_what_is_off():
    wider = replace(DEMO, mlp_dim=1024)
    with pytest.raises(UserError, match=r"wider does not match demo: FLOPs per token differ by 51.6%"):
        verify_match({"demo": DEMO, "wider": wider})
    # A dense model first: sparse parameters are still compared among those that have some.
    larger = with_memory(DEMO, num_keys=260)
    dense = match(DEMO, "dense")
    with pytest.raises(UserError, match=r"larger does not match demo: sparse parameters differ by 3.1%"):
        verify_match({"dense": dense, "demo": DEMO, "larger": larger})
    verify_match({"dense": dense, "demo": DEMO, "larger": larger}, tolerance=0.04)
    verify_match({})


def test_engram_by_hand():
    # 64 reads over 2 memories of 2 orders: 16 heads, whose rows are 128/2/16 = 4 wide. 13,107,200/(2·32·4) is
    # 51,200 rows a head; 32 and then 32 more primes near it are 0.8 % above what is wished.
    engram = match(TINY, "engram")
    (memory,) = engram.memories.values()
    assert memory == families.engram(
        placement="before@2/before@3",
        heads_per_order=16,
        rows_per_head=(50_804,),
        value_dim=4,
        row_multiple=64,
    )
    # 493,568 FLOPs of weights, 26,624 of scoring and 8,192 of lookups; per Engram 2·(2·128·128 + 4·128) and
    # 2·128 for the gate. A unit of the MLPs costs 2·2·4·128.
    freed = 493_568 + 26_624 + 8_192 - 2 * (2 * (2 * 128 * 128 + 4 * 128) + 2 * 128)
    assert engram.mlp_dim == pytest.approx(512 + freed / 2_048, abs=8)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("system", COMBINED)
def test_a_combination_shares_its_sparse_parameters_out(system, share):
    combined = match(TINY, system, table_share=share)
    counted, wanted = accounting.count_parameters(combined), accounting.count_parameters(TINY).sparse
    table = sum(s.num_slots * s.config.table.row_dim for s in combined.sites if s.group == "engram")
    assert table / counted.sparse == pytest.approx(share, rel=0.02)
    assert counted.sparse == pytest.approx(wanted, rel=0.02)
    assert (combined.moe is not None) == (system == "moe-engram")
    verify_match({"base": TINY, system: combined})


def test_shares_that_cannot_be():
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"table_share = .*: must be between 0 and 1"):
            match(TINY, "ultramem-engram", table_share=share)
    with pytest.raises(UserError, match="must be of a model with experts or a memory"):
        with_table_share(PRESETS["dense-tiny"], 0.25)
    with pytest.raises(UserError, match="must be of a model with experts or a memory"):
        with_table_share(PRESETS["engram-tiny"], 0.25)
