"""The ablation's configs: what each rung changes, and its counts beside the published ones."""

import dataclasses
import itertools

import pytest

from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.config import MemoryConfig
from ultramem_jax.errors import UserError
from ultramem_jax.presets import ladder as ladders
from ultramem_jax.presets.ladder import GRID, NOTES, PRESETS, RUNGS, SCALES, TABLE_2, grid, ladder

# Rung by rung, the switch and what goes with it; then the values that the switches take.
CHANGED = [
    {"softmax"},
    {"value_dim", "project_values", "num_keys"},
    {"share_query"},
    {"placement", "num_keys", "key_dim"},
    {"norm_query", "norm_keys"},
    {"expansion"},
    {"tucker_rank"},
    {"num_cores"},
    {"init"},
    {"value_lr_multiple"},
    {"query_conv_width"},
]


def _changed(before, after):
    """Names of the memory's fields that differ; nothing else of the model may."""
    assert dataclasses.replace(after, memory=before.memory) == before
    before, after = dataclasses.asdict(before.memory), dataclasses.asdict(after.memory)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize("scale", SCALES)
def test_each_rung_differs_by_its_switch_alone(scale):
    rungs = ladder(scale)
    assert tuple(rungs) == RUNGS and len(RUNGS) == 12
    found = [_changed(before, after) for before, after in itertools.pairwise(rungs.values())]
    assert found == CHANGED
    assert [set(rung.fields) for rung in TABLE_2[1:]] == CHANGED


@pytest.mark.parametrize("scale", SCALES)
def test_the_ladder_leads_from_pkm_to_ultramem(scale):
    first, *_, last = ladder(scale).values()
    shape = ("placement", "num_keys", "top_m", "num_heads", "key_dim", "value_dim")
    for model, made in ((first, MemoryConfig.pkm), (last, MemoryConfig.ultramem)):
        assert model.memory == made(**{name: getattr(model.memory, name) for name in shape})
    assert first.memory.value_dim == first.embed_dim == 2 * last.memory.value_dim


@pytest.mark.parametrize("rung", TABLE_2, ids=RUNGS)
def test_counts_of_the_paper(rung):
    parameters = count_parameters(PRESETS[rung.name])
    assert parameters.paper_dense / 1e6 == pytest.approx(rung.dense, abs=0.02)
    assert parameters.sparse / 1e9 == pytest.approx(rung.sparse, abs=0.0006)
    # From the sixth rung on the paper counts 0.24 M more than two FLOPs per weight.
    assert flops_per_token(PRESETS[rung.name]).paper / 1e6 == pytest.approx(rung.flops, rel=0.001)


def test_published_losses_fall_as_the_paper_says():
    # Table 2 as a whole: 2.828 to 2.736; share query and the norms cost a little, all else gains or is level.
    assert (TABLE_2[0].val_loss, TABLE_2[-1].val_loss) == (2.828, 2.736)
    worse = [
        after.change for before, after in itertools.pairwise(TABLE_2) if after.val_loss > before.val_loss
    ]
    assert worse == ["share query", "query/key LN"]


def test_tiny_tables_are_equal_and_ten_times_the_layers():
    layers = 12 * 4 * 128**2
    for name, model in {**ladder("tiny"), **grid("tiny")}.items():
        sparse = count_parameters(model).sparse
        assert sparse == pytest.approx(248**2 * 128, rel=0.02), name
        assert sparse / layers == pytest.approx(10, abs=0.1), name


def test_tiny_dense_parameters_are_in_the_proportions_of_the_paper():
    dense = {name: count_parameters(model).paper_dense for name, model in ladder("tiny").items()}
    ours = [dense[name] / dense[RUNGS[-1]] for name in RUNGS]
    published = [rung.dense / TABLE_2[-1].dense for rung in TABLE_2]
    assert ours == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize("scale", SCALES)
def test_each_point_of_a_grid_differs_from_its_base_by_its_field(scale):
    models = ladder(scale) | grid(scale)
    assert set(grid(scale)) == {point.name for point in GRID}
    for point in GRID:
        changed = _changed(models[point.base], models[point.name])
        # 3 does not divide the paper's 500 dimensions of a key.
        widened = {"key_dim"} if (scale, point.name) == ("151m", "tdqkr-r3") else set()
        assert changed == {point.field} | widened, point.name
        assert getattr(models[point.name].memory, point.field) == point.value
    if scale == "151m":
        assert models["tdqkr-r3"].memory.key_dim == 501


@pytest.mark.parametrize("scale", SCALES)
def test_points_that_are_rungs_are_equal_to_them(scale):
    rungs, points = ladder(scale), grid(scale)
    assert points["ive-e4"] == points["ive-alone"] == rungs["ladder-07-ive"]
    assert points["tdqkr-r2"] == rungs["ladder-08-tdqkr"]
    assert points["mcs-h2"] == rungs["ladder-09-mcs"]
    assert len({*rungs.values(), *points.values()}) == 20
    assert points["mcs-alone"].memory.expansion == points["tdqkr-alone"].memory.expansion == 1


def test_presets_are_the_paper_s_and_described():
    assert tuple(PRESETS) == tuple(NOTES) == RUNGS
    for rung in TABLE_2:
        assert rung.change in NOTES[rung.name] and f"{rung.dense:.2f} M" in NOTES[rung.name]
        assert "Published: " in NOTES[rung.name] and "Inferred" in NOTES[rung.name]
    assert PRESETS[RUNGS[0]] == ladders.ultramem_paper.PRESETS["pkm-151m-x10"]


def test_an_unknown_scale_names_the_known():
    with pytest.raises(UserError, match="unknown scale 'tny': did you mean 'tiny'"):
        ladder("tny")
    with pytest.raises(UserError, match="unknown scale"):
        grid("680m")
