"""Figures show the numbers that were given, under labels with their units."""

import statistics

import chex
import numpy as np
import pytest

from experiments.ablate.figures import plot_grids, plot_ladder
from experiments.common import figures


def test_curves_are_means_in_a_band(tmp_path, drawn):
    curves = {
        "ultramem": [([0, 10, 20], [3.0, 2.0, 1.0]), ([0, 10, 20], [5.0, 3.0, 1.5]), ([0, 10], [4.0, 2.5])],
        "dense": [([0, 10], [6.0, 4.0])],
        "other": [([10], [3.0])],
    }
    path = figures.plot_curves(
        curves, tmp_path / "deep" / "curves.png", title="Loss", xlabel="steps", ylabel="loss (nats per token)"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    ultramem, dense, other = axes.lines
    # The third seed ended after two points, so the others are read up to there.
    chex.assert_trees_all_equal(ultramem.get_xdata(), np.array([0, 10]))
    chex.assert_trees_all_equal(ultramem.get_ydata(), np.array([4.0, 2.5]))
    chex.assert_trees_all_equal(dense.get_ydata(), np.array([6.0, 4.0]))
    (band,) = axes.collections  # one seed has no band
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert {(0, 3.0), (0, 5.0), (10, 2.0), (10, 3.0)} <= corners
    assert other.get_marker() == "o"
    assert ultramem.get_color() == "#0072B2"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "ultramem: final 2.500 (2.000–3.000, 3 seeds)",
        "dense: final 4.000",
        "other: final 3.000",
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "loss (nats per token)")


def test_the_same_curves_give_the_same_file(tmp_path):
    curves = {"moe": [([1, 1000, 2000], [3.0, 2.0, 1.0])]}
    first = figures.plot_curves(curves, tmp_path / "a.png", log_y=True).read_bytes()
    assert figures.plot_curves(curves, tmp_path / "b.png", log_y=True).read_bytes() == first


def test_curves_that_cannot_be_averaged_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dense: seed 1 was read at other positions"):
        figures.plot_curves({"dense": [([0, 1], [1, 2]), ([0, 2], [1, 2])]}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="moe has no value"):
        figures.plot_curves({"moe": []}, tmp_path / "a.png")


POINTS = [
    ("PKM", [0.0, 0.0], 0.0),
    ("rm softmax", [-0.2, -0.1], -0.006),
    ("half vdim + proj", [0.1, 0.3], -0.028),
]


def test_ladder_shows_ours_and_the_published_side_by_side(tmp_path, drawn):
    path = plot_ladder(POINTS, tmp_path / "new" / "ladder.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    ours, paper = drawn[0].axes
    assert ours.get_xlabel() == (
        "change since the first rung, bits per byte\n(mean ± standard deviation, 2 seeds)"
    )
    assert paper.get_xlabel() == "change since the first rung, nats per token\n(151 M parameters, table 2)"
    assert (ours.get_title("left"), paper.get_title("left")) == ("here", "UltraMem paper")
    assert [tick.get_text() for tick in ours.get_yticklabels()] == [
        "PKM",
        "+ rm softmax",
        "+ half vdim + proj",
    ]
    # Each seed of each rung, then the means with their bars.
    seeds = [line.get_xdata() for line in ours.lines[:3]]
    assert [list(values) for values in seeds] == [values for _, values, _ in POINTS]
    (bars,) = ours.containers
    chex.assert_trees_all_close(
        bars.lines[0].get_xydata(), np.array([[0, 0], [-0.15, 1], [0.2, 2]]), rtol=1e-7, atol=1e-12
    )
    (segments,) = (lines.get_segments() for lines in bars.lines[2])
    widths = [segment[1, 0] - segment[0, 0] for segment in segments]
    chex.assert_trees_all_close(
        widths, [2 * statistics.stdev(values) for _, values, _ in POINTS], rtol=1e-7, atol=1e-12
    )
    published = paper.lines[0]
    chex.assert_trees_all_equal(published.get_xydata(), np.array([[0.0, 0], [-0.006, 1], [-0.028, 2]]))
    # The first rung is at the top.
    assert ours.get_ylim()[0] > ours.get_ylim()[1] and ours.get_ylim() == paper.get_ylim()


def test_ladder_of_one_seed_says_so(tmp_path, drawn):
    plot_ladder([(label, ours[:1], paper) for label, ours, paper in POINTS], tmp_path / "l.png")
    assert "(one seed)" in drawn[0].axes[0].get_xlabel()


def test_grids_show_the_published_below_ours_where_there_is_any(tmp_path, drawn):
    grids = {
        "ive": [("ive-e4", [-0.2, -0.4], -0.017), ("ive-e9", [-0.1, -0.1], -0.025)],
        "alone": [("ive-alone", [0.1, 0.2], None), ("mcs-alone", [0.3, 0.5], None)],
    }
    plot_grids(grids, tmp_path / "grids.png")
    ive, alone, ive_paper, alone_paper = drawn[0].axes
    assert (ive.get_ylabel(), ive_paper.get_ylabel()) == (
        "here: Δ, bits per byte",
        "paper: Δ, nats per token",
    )
    assert (ive.get_title("left"), alone.get_title("left")) == ("ive", "alone")
    for axes, labels, means in (
        (ive, ["e4", "e9"], [-0.3, -0.1]),
        (alone, ["ive", "mcs"], [0.15, 0.4]),
    ):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == labels
        (bars,) = axes.containers
        chex.assert_trees_all_close(bars.lines[0].get_xydata(), np.array([*enumerate(means)]), rtol=1e-7)
    chex.assert_trees_all_equal(ive_paper.lines[0].get_xydata(), np.array([[0, -0.017], [1, -0.025]]))
    assert ive_paper.axison and not alone_paper.axison
