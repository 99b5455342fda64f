"""Counterparts of an UltraMem model have its compute and its sparse parameters, or there is an error."""

from dataclasses import replace

import pytest

from ultramem_jax import accounting
from ultramem_jax.config import MemoryConfig, ModelConfig
from ultramem_jax.errors import UserError
from ultramem_jax.matching import SYSTEMS, differences, match, match_all, verify_match
from ultramem_jax.presets import PRESETS

DEMO = ModelConfig(
    embed_dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=512,
    memory=MemoryConfig.ultramem(
        placement="1:2", num_keys=256, top_m=16, num_heads=2, key_dim=32, value_dim=64
    ),
)


def with_memory(config, **changes):
    return replace(config, memory=replace(config.memory, **changes))


def test_dense_by_hand():
    # The memory costs 2·(8,192 + 65,536 + 32,768 + 512) = 214,016 in weights, 11,264 in scoring (2 heads of
    # 4·2·512 + 2·4·16 + 2·2·256 + 2·16·12) and 4,096 in lookups. An MLP's unit costs 2·2·(2·128) = 1,024.
    assert (214_016 + 11_264 + 4_096) / 1_024 == 224.0
    dense = match(DEMO, "dense")
    assert dense == replace(DEMO, memory=None, mlp_dim=512 + 224)


def test_moe_by_hand():
    # ultramem-151m-x12: number × width of the experts is 1,858,560,000 / (12·2·1024) = 75,625. The FLOPs left
    # by attention, 347,555,424 - 2·12·4·1024², are 2·12·1024 × (number + 2·2·width), so that sum is 10,045.9:
    # width 2,503.8 and number 30.2.
    base = PRESETS["ultramem-151m-x12"]
    moe = match(base, "moe").moe
    assert (moe.num_experts, moe.expert_dim, moe.top_k) == (30, 2512, 2)
    assert moe.num_experts * moe.expert_dim == pytest.approx(75_625, rel=0.005)


def test_pkm_by_hand():
    # ultramem-151m-x12: √(1,858,560,000 / 1024) = 1347.2 keys per side; 3·2·42 reads over 2 heads.
    base = PRESETS["ultramem-151m-x12"]
    pkm = match(base, "pkm")
    assert pkm.memory == MemoryConfig.pkm(
        placement="6:6", num_keys=1347, top_m=126, num_heads=2, key_dim=pkm.memory.key_dim, value_dim=1024
    )
    assert pkm.mlp_dim == base.mlp_dim
    # Memories of 2·(7,525,248·3 weights) less lookup and scoring, over 2·(4·1024 + 4·1347) a key dimension.
    wanted = (2 * 3 * 7_525_248 + 258_048 + 156_000 - 2 * 252 * 1024 - 2 * (126**2 + 126)) / 18_968
    assert pkm.memory.key_dim == pytest.approx(wanted, abs=8)


def test_the_base_stands_for_itself():
    assert match(DEMO, "ultramem") is DEMO
    assert list(match_all(DEMO)) == list(SYSTEMS) == ["ultramem", "dense", "moe", "pkm"]


BASES = {
    "tiny": PRESETS["ultramem-tiny"],
    "demo": DEMO,
    "151m": PRESETS["ultramem-151m-x12"],
    "gated": replace(PRESETS["ultramem-tiny"], mlp="swiglu", mlp_dim=344),
    "memory everywhere": with_memory(PRESETS["ultramem-tiny"], placement="full"),
    "few slots": with_memory(PRESETS["ultramem-tiny"], num_keys=160),
    "wide keys": with_memory(PRESETS["ultramem-tiny"], rank_keys="full", key_dim=256),
    "narrow keys": replace(
        PRESETS["ultramem-tiny"],
        memory=MemoryConfig.pkm(placement="2:2", num_keys=320, num_heads=1, key_dim=2, value_dim=128),
    ),
    "grouped queries": replace(PRESETS["ultramem-tiny"], num_kv_heads=2, tie_embeddings=False),
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


def test_the_mlp_takes_what_keys_cannot():
    wide, narrow = match(BASES["wide keys"], "pkm"), match(BASES["narrow keys"], "pkm")
    assert (wide.memory.key_dim, narrow.memory.key_dim) == (4 * 128, 8)
    assert wide.mlp_dim > 512 and narrow.mlp_dim < 512


def test_pkm_reads_no_more_than_its_keys_allow():
    # 4 memories × 2 heads × 16 reads would be 64 for each of the two heads.
    base = with_memory(PRESETS["ultramem-tiny"], placement="full", num_keys=40, value_dim=64)
    pkm = match(base, "pkm")
    assert pkm.memory.num_keys == 57  # √(4·1600·64/128) = 56.6
    assert pkm.memory.top_m == 57


def test_activation_of_the_experts_is_the_mlps():
    assert match(BASES["gated"], "moe").moe.activation == "swiglu"


def test_impossible_matches_say_what_failed():
    # 2·8²·96 = 12,288 sparse parameters are 96 values of width 128: the nearest square is 100, 4.2 % off.
    few = with_memory(PRESETS["ultramem-tiny"], num_keys=8, top_m=8, value_dim=96)
    with pytest.raises(UserError, match=r"no pkm model .* within 2.0%; .*sparse parameters off by 4.2%"):
        match(few, "pkm")
    # As two experts in each of 4 layers they are 6 units wide: nowhere near the compute.
    with pytest.raises(UserError, match=r"no moe model .* FLOPs per token off by"):
        match(few, "moe")


def test_only_a_model_with_a_memory_has_counterparts():
    with pytest.raises(UserError, match="must have a memory"):
        match(ModelConfig(), "moe")
    with pytest.raises(UserError, match="did you mean 'dense'"):
        match(DEMO, "dens")


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
