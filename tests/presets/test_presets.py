"""Every preset, with its exact parameter counts: a preset that is not listed here fails.

And the published figures of those that have some, against the counts of our shapes.
"""

from dataclasses import replace
from decimal import Decimal

import pytest

from ultramem_jax import accounting
from ultramem_jax.baselines.matching import match_all, verify_match
from ultramem_jax.commands.count_tables import compare_counts
from ultramem_jax.errors import UserError
from ultramem_jax.presets import NOTES, PRESETS, engram_paper, ladder, preset, ultramem_paper, v2_paper
from ultramem_jax.presets.published import PUBLISHED, TABLE_3, Printed, Published

# 257·128 embeddings and 9·128 gains.
TINY = 32_896 + 1_152
# 50,432·D embeddings and (2·L + 1)·D gains; 12·L·D² weights in the layers, a third of them attention's.
REST_151M, LAYERS_151M = 51_642_368 + 25_600, 150_994_944
REST_680M, LAYERS_680M = 77_463_552 + 75_264, 679_477_248
REST_1_6B, LAYERS_1_6B = 103_284_736 + 133_120, 1_610_612_736
# 50,304·768 embeddings, (41 + 2·20)·768 gains, 20·4·768² of attention; MLPs are 20·3·768 times their width.
REST_227M = 38_633_472 + 62_208 + 47_185_920
MLP_227M = 46_080
# 2·50,304·2048 embeddings, (33 + 2·16)·2048 gains, 16·4·2048² of attention; MLPs are 16·3·2048 times theirs.
REST_1B = 206_045_184 + 133_120 + 268_435_456
MLP_1B = 98_304

# name: (dense, sparse) parameters, embeddings and gains included.
COUNTS = {
    # 12·4·128² and 2 memories of 128·64 + 2·2·640·32 + 2·32 + 16 + 256·128 + 4·128
    "ultramem-tiny": (TINY + 786_432 + 2 * 123_472, 2 * 320**2 * 64),
    # 4·(4·128² + 2·128·768)
    "dense-tiny": (TINY + 262_144 + 786_432, 0),
    # 16·128² + 4·128·34, and 4·34 experts of 2·128·376
    "moe-tiny": (TINY + 262_144 + 17_408, 4 * 34 * 2 * 128 * 376),
    # 16·128² + 4·128·147, and 4·147 experts of 3·128·58
    "moe-fine-tiny": (TINY + 262_144 + 75_264, 4 * 147 * 3 * 128 * 58),
    # 48·128² + 128·2·2·144 + 2·2·320·144
    "pkm-tiny": (TINY + 786_432 + 73_728 + 184_320, 320**2 * 128),
    # ... and 2·144
    "pkm-improved-tiny": (TINY + 786_432 + 73_728 + 184_320 + 288, 320**2 * 128),
    # 48·128² and 2 memories of 128·2·2·53 + 2·2·320·53 + 2·53 + 2·128², over one table
    "memory-plus-tiny": (TINY + 786_432 + 2 * 127_850, 320**2 * 128),
    # 48·128² + 128·2·8·44 + 2·226·44 + 44; a slot has two vectors 128 wide
    "peer-tiny": (TINY + 786_432 + 90_112 + 19_888 + 44, 226**2 * 256),
    # 4·(4·128² + 2·128·536) and 4 memories that read 319² of 4·226² slots:
    # 128·2·32 + 2·2·319·32 + 2·32 + 8 + 32·128 + 128·32
    "ultramem-v2-tiny": (TINY + 262_144 + 548_864 + 4 * 57_288, 4 * 226**2 * 64),
    # 4·(4·128² + 2·128·704), 2 memories of 2·(128 + 1)·128 + 3·128 + 4·128; 128 primes from 50,804 on
    "engram-tiny": (TINY + 262_144 + 720_896 + 2 * 33_920, (1_631_616 + 1_642_880) * 4),
    # as ultramem-tiny, with 2·2·384·32 keys in each memory
    "ultramem-demo": (TINY + 786_432 + 2 * 90_704, 2 * 192**2 * 64),
    "dense-151m": (REST_151M + LAYERS_151M, 0),
    # 4·12·1024² + 12·1024·32, and 12·32 experts of 2·1024·2528
    "moe-151m-2in32": (REST_151M + 50_331_648 + 393_216, 12 * 32 * 2 * 1024 * 2528),
    # 1024·2·2·2448 + 2·2·1224·2448
    "pkm-151m-x10": (REST_151M + LAYERS_151M + 10_027_008 + 11_985_408, 1224**2 * 1024),
    # 3 memories of 1024·1000 + 2·2·2200·500 + 2·500 + 16 + 2048·1024 + 4·1024
    "ultramem-151m-x12": (REST_151M + LAYERS_151M + 3 * 7_526_264, 3 * 1100**2 * 512),
    "dense-680m": (REST_680M + LAYERS_680M, 0),
    # 4·24·1536² + 24·1536·33, and 24·33 experts of 2·1536·3584
    "moe-680m-2in33": (REST_680M + 226_492_416 + 1_216_512, 24 * 33 * 2 * 1536 * 3584),
    # 4 memories of 1536·1440 + 2·2·3264·720 + 2·720 + 16 + 3072·1536 + 4·1536
    "ultramem-680m-x12": (REST_680M + LAYERS_680M + 4 * 16_338_352, 4 * 1632**2 * 768),
    "dense-1.6b": (REST_1_6B + LAYERS_1_6B, 0),
    # 4·32·2048² + 32·2048·34, and 32·34 experts of 2·2048·4672
    "moe-1.6b-2in34": (REST_1_6B + 536_870_912 + 2_228_224, 32 * 34 * 2 * 2048 * 4672),
    # 6 memories of 2048·1600 + 2·2·3578·800 + 2·800 + 16 + 4096·2048 + 4·2048
    "ultramem-1.6b-x12": (REST_1_6B + LAYERS_1_6B + 6 * 23_124_816, 6 * 1789**2 * 1024),
    # 50,432·4096 + 65·4096 + 12·32·4096²
    "dense-6.5b": (206_569_472 + 266_240 + 6_442_450_944, 0),
    # The ladder: as pkm-151m-x10 ...
    "ladder-01-pkm": (REST_151M + LAYERS_151M + 22_012_416, 1224**2 * 1024),
    "ladder-02-rm-softmax": (REST_151M + LAYERS_151M + 22_012_416, 1224**2 * 1024),
    # 1024·2·2·2448 + 2·2·1728·2448 + 512·1024
    "ladder-03-half-vdim": (REST_151M + LAYERS_151M + 27_471_872, 1728**2 * 512),
    # ... with half of the queries
    "ladder-04-share-query": (REST_151M + LAYERS_151M + 22_458_368, 1728**2 * 512),
    # 3 memories of 1024·2·500 + 2·2·1000·500 + 512·1024
    "ladder-05-split-skip": (REST_151M + LAYERS_151M + 3 * 3_548_288, 3 * 1000**2 * 512),
    # ... and 2·500
    "ladder-06-query-key-ln": (REST_151M + LAYERS_151M + 3 * 3_549_288, 3 * 1000**2 * 512),
    # ... twice the keys, four projections
    "ladder-07-ive": (REST_151M + LAYERS_151M + 3 * 7_122_152, 3 * 1000**2 * 512),
    # ... and 2 heads' cores of 2², once and twice
    "ladder-08-tdqkr": (REST_151M + LAYERS_151M + 3 * 7_122_160, 3 * 1000**2 * 512),
    "ladder-09-mcs": (REST_151M + LAYERS_151M + 3 * 7_122_168, 3 * 1000**2 * 512),
    "ladder-10-improved-init": (REST_151M + LAYERS_151M + 3 * 7_122_168, 3 * 1000**2 * 512),
    "ladder-11-value-lr": (REST_151M + LAYERS_151M + 3 * 7_122_168, 3 * 1000**2 * 512),
    # ... and 4·1024
    "ladder-12-query-conv": (REST_151M + LAYERS_151M + 3 * 7_126_264, 3 * 1000**2 * 512),
    # 20·768·64, and 20·64 experts of 3·768·384
    "olmoe-227m-1.2b": (REST_227M + 983_040, 20 * 64 * 3 * 768 * 384),
    # 4 memories of 768·2·2·384 + 2·2·1138·384 + 2·384 + 2·768², over one table
    "memory-plus-227m-1.2b": (REST_227M + 3008 * MLP_227M + 4 * 4_108_032, 1138**2 * 768),
    # 4 memories of 768·2·192 + 2·2·2·1616·192 + 2·192 + 16 + 4·384·768
    "ultramem-227m-1.2b": (REST_227M + 2752 * MLP_227M + 4 * 3_957_136, 4 * 808**2 * 384),
    # 20 memories that read 1138² of 20·360² slots: 768·2·192 + 2·2·1138·192 + 2·192 + 8 + 2·192·768
    "ultramem-v2-227m-1.2b": (REST_227M + 2496 * MLP_227M + 20 * 1_464_200, 20 * 360**2 * 384),
    # Embedding 129,280·2560, gains 61·2560, 30·(4·2560² + 3·2560·6848), and 2 memories of
    # 2·(2560 + 1)·2560 + 3·2560 + 4·2560; 32 primes from 1,113,280 on, 160 wide
    "engram-27b-table": (
        330_956_800 + 156_160 + 30 * (26_214_400 + 52_592_640) + 2 * 13_130_240,
        (17_815_552 + 17_819_648) * 160,
    ),
    # 16·2048·64, and 16·64 experts of 3·2048·1024
    "olmoe-1b-7b": (REST_1B + 2_097_152, 16 * 64 * 3 * 2048 * 1024),
    # 4 memories of 2048·2·2·1024 + 2·2·1659·1024 + 2·1024 + 2·2048², over one table
    "memory-plus-1b-7b": (REST_1B + 7232 * MLP_1B + 4 * 23_574_528, 1659**2 * 2048),
    # 4 memories of 2048·2·512 + 2·2·2·2346·512 + 2·512 + 16 + 4·1024·2048
    "ultramem-1b-7b": (REST_1B + 7424 * MLP_1B + 4 * 20_096_016, 4 * 1173**2 * 1024),
    # 16 memories that read 587² of 16·587² slots:
    # 2048·2·2·512 + 2·2·1174·512 + 2·512 + 8 + 768·2048 + 2048·256
    "ultramem-v2-1b-7b": (REST_1B + 6784 * MLP_1B + 16 * 8_696_840, 16 * 587**2 * 1024),
}

PAPERS = [*ultramem_paper.PRESETS, *ladder.PRESETS, *v2_paper.PRESETS, *engram_paper.PRESETS]


def test_every_preset_is_listed_here_and_described():
    assert set(PRESETS) == set(COUNTS) == set(NOTES)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_exact_parameter_counts(name):
    parameters = accounting.count_parameters(PRESETS[name])
    assert (parameters.dense, parameters.sparse) == COUNTS[name]


@pytest.mark.parametrize("name", PAPERS)
def test_notes_tell_published_from_inferred(name):
    assert "Published: " in NOTES[name]
    assert "Inferred" in NOTES[name]


# Table 2: train loss, validation loss, dense parameters (M), sparse parameters (G), FLOPs (M).
TABLE_2 = {
    "ladder-01-pkm": ("2.604", "2.828", "173.01", "1.534", "346.06"),
    "ladder-02-rm-softmax": ("2.570", "2.822", "173.01", "1.534", "346.06"),
    "ladder-03-half-vdim": ("2.556", "2.800", "178.47", "1.529", "356.98"),
    "ladder-04-share-query": ("2.560", "2.803", "173.46", "1.529", "346.96"),
    "ladder-05-split-skip": ("2.554", "2.788", "161.64", "1.536", "323.32"),
    "ladder-06-query-key-ln": ("2.553", "2.789", "161.64", "1.536", "323.54"),
    "ladder-07-ive": ("2.544", "2.772", "172.37", "1.536", "344.98"),
    "ladder-08-tdqkr": ("2.538", "2.764", "172.37", "1.536", "344.98"),
    "ladder-09-mcs": ("2.521", "2.761", "172.37", "1.536", "344.98"),
    "ladder-10-improved-init": ("2.518", "2.758", "172.37", "1.536", "344.98"),
    "ladder-11-value-lr": ("2.494", "2.736", "172.37", "1.536", "344.98"),
    "ladder-12-query-conv": ("2.493", "2.736", "172.38", "1.536", "345.02"),
}


@pytest.mark.parametrize("name", TABLE_2)
def test_the_ladder_is_published_with_these_figures(name):
    train, val, dense, sparse, flops = TABLE_2[name]
    published = PUBLISHED[name]
    assert (published.train_loss, published.val_loss) == (Decimal(train), Decimal(val))
    assert str(published.dense_params) == f"{dense} M"
    assert str(published.sparse_params) == f"{sparse} G"
    assert str(published.flops) == f"{flops} M"
    assert NOTES[name].endswith(
        f"Published results: training loss {train} and C4 validation loss {val} nats per token."
    )


def test_the_grids_are_published_with_these_differences():
    # Table 3: IVE E 4/9/16, TDQKR r 2/3/4, MCS h 2/4/8.
    expected = ["-0.017", "-0.025", "-0.027", "-0.008", "-0.0084", "-0.0082", "-0.003", "0.001", "0.006"]
    assert list(TABLE_3.values()) == [Decimal(change) for change in expected]
    assert list(TABLE_3) == [point.name for point in ladder.GRID if point.part != "alone"]


# Differences from published figures that their rounding does not explain, as shares of the figure. The ladder
# has others, all below 0.1 %.
MISFITS = {
    ("moe-680m-2in33", "FLOPs/token"): 0.0083,  # narrower experts would miss the total instead
    ("dense-1.6b", "FLOPs/token"): 0.0035,  # 2·12·L·D² is 3.22; printed is 3.21, twice 1.61 cut off
    ("moe-1.6b-2in34", "FLOPs/token"): 0.0022,
    ("olmoe-227m-1.2b", "active params"): 0.0063,  # the router is 0.0043 of it
    ("ultramem-227m-1.2b", "active params"): 0.0067,
    ("ultramem-v2-227m-1.2b", "active params"): 0.0140,
    ("memory-plus-227m-1.2b", "active params"): 0.0613,  # wide keys, and a query for each head
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_shapes_have_the_published_counts(name):
    compared = compare_counts(name, PRESETS[name], PUBLISHED[name])
    assert compared
    for count in compared:
        expected = MISFITS.get((name, count.quantity))
        if expected is not None:
            assert count.relative == pytest.approx(expected, abs=5e-5)
            assert not count.is_rounding
        elif "UltraMem, table 2" in count.source:
            assert abs(count.relative) < 0.001
        else:
            assert count.is_rounding, count
            assert abs(count.relative) < (0.03 if str(count.published) == "1.2 B" else 0.01)


def test_every_model_of_a_paper_has_published_figures_but_the_inferred_ones():
    inferred = {f"{system}-1b-7b" for system in ("memory-plus", "ultramem", "ultramem-v2")}
    assert set(PAPERS) - set(PUBLISHED) == inferred
    assert set(PUBLISHED) <= set(PAPERS)


@pytest.mark.parametrize("name", ["memory-plus-1b-7b", "ultramem-1b-7b", "ultramem-v2-1b-7b"])
def test_inferred_models_match_olmoe(name):
    ours = accounting.count_parameters(PRESETS[name])
    olmoe = accounting.count_parameters(PRESETS["olmoe-1b-7b"])
    assert ours.total == pytest.approx(olmoe.total, rel=0.002)
    assert ours.active_total == pytest.approx(olmoe.active_total, rel=0.003)
    assert "Inferred: the shapes" in NOTES[name]


def test_rows_read_are_a_small_part_of_the_active_parameters():
    # They are left out of `active_total`; this is how much that can be.
    for name in v2_paper.PRESETS:
        config = PRESETS[name]
        active = accounting.count_parameters(config).active_total
        # One token, float32; coinciding reads of shared tables would make it less.
        assert accounting.bytes_per_token(config, 1).memory / 4 < 0.0021 * active


@pytest.mark.parametrize(
    ("digits", "unit", "value", "half_a_unit"),
    [
        ("2.04", "B", 2.04e9, 5e6),
        ("0.30", "G", 0.3e9, 5e6),
        ("173.01", "M", 173.01e6, 5e3),
        ("227", "M", 227e6, 5e5),
    ],
)
def test_a_printed_count_is_right_to_half_a_unit_of_its_last_digit(digits, unit, value, half_a_unit):
    printed = Printed(digits, unit)
    assert (printed.value, printed.rounding, str(printed)) == (value, half_a_unit, f"{digits} {unit}")


def test_what_was_published_of_the_quality_in_a_sentence():
    assert Published("x").results() == ""
    assert PUBLISHED["dense-151m"].results() == (
        "Published results: C4 validation loss 2.96 nats per token, 26.77 % on average over ten tasks."
    )
    results = PUBLISHED["olmoe-227m-1.2b"].results()
    assert results == "Published results: evaluation loss 2.845 nats per token."


def test_a_comparison_follows_the_convention_of_its_source():
    config = PRESETS["dense-151m"]
    figures = Published(source="x", dense_params=Printed("150", "M"), active_params=Printed("0.15", "B"))
    dense, active = compare_counts("a", config, figures)
    assert (dense.ours, active.ours) == (150_994_944, 150_994_944)
    assert dense.relative == pytest.approx(994_944 / 150e6)
    assert not dense.is_rounding and active.is_rounding
    whole = compare_counts("a", config, replace(figures, counts_embeddings=True))
    assert [count.ours for count in whole] == [REST_151M + 150_994_944] * 2


def test_the_tiny_family_is_what_matching_finds():
    # After a change to `ultramem-tiny`, copy the shapes that this prints.
    family = match_all(PRESETS["ultramem-tiny"])
    assert {f"{system}-tiny": config for system, config in family.items()} == {
        name: config for name, config in PRESETS.items() if name.endswith("-tiny")
    }
    verify_match({name: PRESETS[name] for name in PRESETS if name.endswith("-tiny")})


def test_the_tiny_tables_dwarf_the_layers():
    parameters = accounting.count_parameters(PRESETS["ultramem-tiny"])
    assert parameters.sparse / (12 * 4 * 128**2) == pytest.approx(16.7, abs=0.05)


def test_an_unknown_preset_names_the_nearest():
    assert preset("dense-tiny") is PRESETS["dense-tiny"]
    with pytest.raises(UserError, match="unknown preset 'ultramem-tny': did you mean 'ultramem-tiny'"):
        preset("ultramem-tny")
