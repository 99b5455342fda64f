"""Slots are described as oracles do: promoted tokens, nearest slots, usage, curves over training."""

from dataclasses import replace

import numpy as np
import pytest

from tests.inspection.models import BASE, MODEL, SMALL, stored_as_float, variables
from tests.support.drawn import variables_of
from ultramem_jax.config.memory_parts import ReadoutConfig
from ultramem_jax.errors import UserError
from ultramem_jax.inspection import nearest_slots, neighbours, promoted_tokens, training_curves, usage
from ultramem_jax.presets import families


def _expected(config, held, rows, matrix, k):
    """The k largest and smallest of value · matrix ⊙ gain · output."""
    params = held["params"]
    output = params["embedding"].T if config.tie_embeddings else params["output"]
    gain = np.asarray(params["final_norm"]["scale"], np.float64)
    scores = (rows @ matrix * gain) @ np.asarray(output, np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")
    return scores, order[:, :k], order[:, ::-1][:, :k]


def _check(found, scores, most, least):
    np.testing.assert_array_equal(found.promoted, most)
    np.testing.assert_array_equal(found.suppressed, least)
    np.testing.assert_allclose(
        found.promoted_scores, np.take_along_axis(scores, most, 1), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        found.suppressed_scores, np.take_along_axis(scores, least, 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "name, table, matrix, width",
    [
        ("ultramem_0", "ultramem_0", "projection", 8),
        ("ring_1", "ring_tables", "projection", 8),
        ("engram_0", "engram_0", "value_projection", 4),
    ],
)
def test_promoted_tokens(name, table, matrix, width):
    held, slots = variables(), np.array([3, 60, 17])
    projection = np.asarray(held["params"][name][matrix], np.float64)
    rows = stored_as_float(held["memory"][table]["values"])[slots]
    blocks = np.array([1, 0, 1]) if name != "ring_1" else np.zeros(3, int)
    site = next(site for site in MODEL.sites if site.name == name)
    weights = np.linspace(-1, 2, 3 * site.config.address.weights_per_read, dtype=np.float32).reshape(3, -1)
    weighed = rows * np.repeat(weights.astype(np.float64), width // weights.shape[1], axis=1)
    found = promoted_tokens(MODEL, held, name, slots, 4, blocks=blocks, weights=weights)
    for i, block in enumerate(blocks):
        expected = _expected(
            MODEL, held, weighed[i : i + 1], projection[block * width : (block + 1) * width], 4
        )
        _check(type(found)(*(of[i : i + 1] for of in found)), *expected)


def test_promoted_tokens_of_values_that_are_the_output_and_of_fewer_ids():
    config = replace(
        BASE,
        tie_embeddings=True,
        memories={"pkm": families.pkm(placement="1:1", **SMALL | {"value_dim": 16})},
    )
    held = variables_of(config)
    rows = stored_as_float(held["memory"]["pkm_0"]["values"])[[5]]
    found = promoted_tokens(config, held, "pkm_0", [5], 3, vocab_size=100)
    scores, *_ = _expected(config, held, rows, np.eye(16), 3)
    order = np.argsort(-scores[:, :100], axis=1, kind="stable")
    _check(found, scores, order[:, :3], order[:, ::-1][:, :3])


def test_a_readout_that_does_not_say_is_named():
    with pytest.raises(
        UserError, match=r"readout.kind = 'odd': must be a kind whose config has `value_matrix`"
    ):
        ReadoutConfig(kind="odd").value_matrix(MODEL.sites[0], {}, 0)
    with pytest.raises(UserError, match=r"block of ring_0 = 1: must be in \[0, 1\)"):
        promoted_tokens(MODEL, variables(), "ring_0", [1], blocks=np.array([1]))


@pytest.mark.parametrize("name", ["ultramem_0", "ring_tables"])
def test_nearest_slots(name, monkeypatch):
    monkeypatch.setattr(neighbours, "_CHUNK_NUMBERS", 8 * 27)  # chunks that do not divide the table
    held = variables()
    table = held["memory"][name]
    if name == "ring_tables":
        table = table | {"values": table["values"].at[7].set(0.0).at[9].set(np.nan).at[11, 2].set(np.inf)}
        held = held | {"memory": held["memory"] | {name: table}}
    rows, slots, seen = stored_as_float(table["values"]), [3, 7, 50], []
    found, cosines = nearest_slots(MODEL, held, name, slots, 5, progress=seen.append)
    assert sum(seen) == len(rows) and len(seen) > 2
    lengths = np.linalg.norm(rows, axis=1)
    for slot, ids, of_slot in zip(slots, found, cosines, strict=True):
        with np.errstate(invalid="ignore"):
            expected = rows @ rows[slot] / np.maximum(lengths * lengths[slot], 1e-30)
        expected[slot] = -np.inf
        expected[~np.isfinite(expected)] = -np.inf  # rows that are not finite are near to none
        order = np.argsort(-expected, kind="stable")[:5]
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_allclose(of_slot, expected[order], atol=1e-6)


def test_usage_and_its_definition():
    counts = np.array([0, 5, 0, 1, 1, 0, 5, 8] + [0] * 192)
    found = usage(counts, 3)
    shares = counts[counts > 0] / 20
    assert (found.num_slots, found.num_reads) == (200, 20)
    assert found.never_read_share == pytest.approx(195 / 200)
    assert found.top_share == pytest.approx(13 / 20)  # the two slots that are 1 % of 200
    assert found.entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert found.entropy_share == pytest.approx(found.entropy / np.log(200))
    assert found.most_read.tolist() == [7, 1, 6] and found.most_counts.tolist() == [8, 5, 5]
    assert found.ranks.tolist() == [1, 2, 3, 5] and found.rank_counts.tolist() == [8, 5, 5, 1]
    even = usage(np.full(50, 4))
    assert even.entropy_share == pytest.approx(1) and even.never_read_share == 0
    assert usage(np.array([0, 3])).entropy == 0 and usage(np.array([0, 3]), 5).most_read.tolist() == [1]
    with pytest.raises(UserError, match="reads of the table = 0: must be at least 1"):
        usage(np.zeros(5, int))


def test_curves_over_training():
    records = [
        {"step": 10, "split": "train", "ultramem_0/read_entropy": 3.5, "ring_tables/slots_read_share": 0.5},
        {"step": 10, "split": "validation", "loss": 1.0},
        {
            "step": 20,
            "split": "train",
            "ultramem_0/read_entropy": float("nan"),
            "ring_tables/slots_read_share": 1,
        },
    ]
    assert training_curves(MODEL, records) == {
        "ultramem_0": {"read_entropy": ([10], [3.5])},
        "ring_tables": {"slots_read_share": ([10, 20], [0.5, 1.0])},
    }
