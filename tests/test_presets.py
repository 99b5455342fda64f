"""Every preset, with its exact parameter counts: a preset that is not listed here fails."""

import pytest

from ultramem_jax import accounting
from ultramem_jax.errors import UserError
from ultramem_jax.matching import match_all, verify_match
from ultramem_jax.presets import NOTES, PRESETS, preset

# name: (dense, sparse) parameters, embeddings and gains included.
COUNTS = {
    # 257·128 + 9·128 (gains) + 12·4·128² + 2 memories of 128·64 + 2·2·640·32 + 2·32 + 16 + 256·128 + 4·128
    "ultramem-tiny": (32_896 + 1_152 + 786_432 + 2 * 123_472, 2 * 320**2 * 64),
    # 257·128 + 9·128 + 4·(4·128² + 2·128·768)
    "dense-tiny": (32_896 + 1_152 + 262_144 + 786_432, 0),
    # 257·128 + 9·128 + 16·128² + 4·128·34, and 4·34 experts of 2·128·376
    "moe-tiny": (32_896 + 1_152 + 262_144 + 17_408, 4 * 34 * 2 * 128 * 376),
    # 257·128 + 9·128 + 48·128² + 128·2·2·144 + 2·2·320·144
    "pkm-tiny": (32_896 + 1_152 + 786_432 + 73_728 + 184_320, 320**2 * 128),
    # as ultramem-tiny, with 2·2·384·32 keys in each memory
    "ultramem-demo": (32_896 + 1_152 + 786_432 + 2 * 90_704, 2 * 192**2 * 64),
    # 50,432·1024 + 25·1024 + 12·12·1024²
    "dense-151m": (51_642_368 + 25_600 + 150_994_944, 0),
    # ... with 4·12·1024² + 12·1024·32, and 12·32 experts of 2·1024·2528
    "moe-151m-2in32": (51_642_368 + 25_600 + 50_331_648 + 393_216, 12 * 32 * 2 * 1024 * 2528),
    # ... and 1024·2·2·2448 + 2·2·1224·2448
    "pkm-151m-x10": (51_642_368 + 25_600 + 150_994_944 + 10_027_008 + 11_985_408, 1224**2 * 1024),
    # ... and 3 memories of 1024·1000 + 2·2·2200·500 + 2·500 + 16 + 2048·1024 + 4·1024
    "ultramem-151m-x12": (51_642_368 + 25_600 + 150_994_944 + 3 * 7_526_264, 3 * 1100**2 * 512),
}


def test_every_preset_is_listed_here_and_described():
    assert set(PRESETS) == set(COUNTS) == set(NOTES)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_exact_parameter_counts(name):
    parameters = accounting.count_parameters(PRESETS[name])
    assert (parameters.dense, parameters.sparse) == COUNTS[name]


@pytest.mark.parametrize("name", [name for name in sorted(PRESETS) if "151m" in name])
def test_notes_tell_published_from_inferred(name):
    assert "Published: " in NOTES[name]
    assert "Inferred" in NOTES[name]


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
