"""Tables and figures hold the numbers given to them, and nothing about who made them."""

import csv
import getpass
import pathlib
import platform
import sys

import jax
import numpy as np
import pytest

from experiments import report


def test_environment_names_versions_and_devices(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", "train", "--steps=3"])
    found = report.environment()
    assert found["command"] == "python launch.py train --steps=3"
    assert found["jax"] == jax.__version__
    assert found["numpy"] == np.__version__
    assert found["python"] == platform.python_version()
    assert found["devices"] == "8 × cpu (cpu)"
    assert int(found["cores"]) >= 1
    assert {"cpu", "os", "jaxlib", "flax", "optax", "orbax-checkpoint", "date"} <= set(found)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        ([str(report._ROOT / "launch.py"), "bench_step"], "python launch.py bench_step"),
        (
            ["launch.py", "--out=/somewhere/else/runs", "--data", "/a/b/enwik8.gz"],
            "python launch.py --out=runs --data enwik8.gz",
        ),
        (
            ["launch.py", f"--out={report._ROOT}/experiments/results"],
            "python launch.py --out=experiments/results",
        ),
        (
            ["launch.py", "~/private/config.py", "../place/config.py"],
            "python launch.py config.py config.py",
        ),
        (["launch.py", "--config.title=two words"], "python launch.py '--config.title=two words'"),
        (["-c"], "python -c"),
    ],
)
def test_command_is_told_without_foreign_folders(argv, command):
    assert report._command(argv) == command


def test_nothing_written_names_host_or_user(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(report._ROOT / "launch.py"), f"--out={tmp_path}"])
    monkeypatch.setattr(platform, "node", lambda: "host-of-mine")
    markdown, table = report.write_table([{"loss": 1.0}], tmp_path / "t", "Loss", report.environment())
    text = markdown.read_text() + table.read_text()
    secrets = ["host-of-mine", str(pathlib.Path.home()) + "/", str(tmp_path.parent), str(report._ROOT)]
    if len(getpass.getuser()) > 4:
        secrets.append(f"/{getpass.getuser()}/")
    assert [secret for secret in secrets if secret in text] == []


def test_table_is_rounded_to_read_and_exact_to_compute_with(tmp_path):
    rows = [
        {"system": "ultramem", "loss": 1.234567, "slots": 102400, "met": True},
        {"system": "a|b", "loss": 0.000012345, "slots": None, "extra": float("nan")},
    ]
    markdown, table = report.write_table(
        rows,
        tmp_path / "new" / "table.v1",
        "Loss (nats)",
        {"cpu": "Fast One", "os": "Linux"},
        ["Three seeds."],
    )
    assert markdown.name == "table.v1.md"
    assert markdown.read_text() == (
        "# Loss (nats)\n"
        "\n"
        "| system | loss | slots | met | extra |\n"
        "| :-- | --: | --: | --: | --: |\n"
        "| ultramem | 1.235 | 102,400 | yes |  |\n"
        "| a\\|b | 1.234e-05 |  |  | nan |\n"
        "\n"
        "Three seeds.\n"
        "\n"
        "## Where this was measured\n"
        "\n"
        "- cpu: `Fast One`\n"
        "- os: `Linux`\n"
    )
    with table.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read[0] == {
        "system": "ultramem",
        "loss": "1.234567",
        "slots": "102400",
        "met": "True",
        "extra": "",
    }
    assert read[1]["loss"] == "1.2345e-05"


def test_an_empty_table_is_written_too(tmp_path):
    markdown, table = report.write_table([], tmp_path / "none", "Nothing", {})
    assert "(no rows)" in markdown.read_text()
    assert table.read_text() == "\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12345.678, "12,346"),
        (1.5, "1.500"),
        (99.996, "100.00"),
        (-0.05, "-0.05000"),
        (3.2e9, "3.200e+09"),
        (float("inf"), "inf"),
    ],
)
def test_four_significant_digits(value, text):
    assert report._significant(value, 4) == text


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, kept for a look at what is in them."""
    figures = []
    close = report.plt.close
    monkeypatch.setattr(report.plt, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)


def test_curves_are_means_in_a_band(tmp_path, drawn):
    curves = {
        "ultramem": [([0, 10, 20], [3.0, 2.0, 1.0]), ([0, 10, 20], [5.0, 3.0, 1.5]), ([0, 10], [4.0, 2.5])],
        "dense": [([0, 10], [6.0, 4.0])],
        "other": [([10], [3.0])],
    }
    path = report.plot_curves(
        curves, tmp_path / "deep" / "curves.png", title="Loss", xlabel="steps", ylabel="loss (nats per token)"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    ultramem, dense, other = axes.lines
    # The third seed ended after two points, so the others are read up to there.
    np.testing.assert_array_equal(ultramem.get_xdata(), [0, 10])
    np.testing.assert_array_equal(ultramem.get_ydata(), [4.0, 2.5])
    np.testing.assert_array_equal(dense.get_ydata(), [6.0, 4.0])
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
    first = report.plot_curves(curves, tmp_path / "a.png", log_y=True).read_bytes()
    assert report.plot_curves(curves, tmp_path / "b.png", log_y=True).read_bytes() == first


def test_curves_that_cannot_be_averaged_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dense: seed 1 was read at other positions"):
        report.plot_curves({"dense": [([0, 1], [1, 2]), ([0, 2], [1, 2])]}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="moe has no value"):
        report.plot_curves({"moe": []}, tmp_path / "a.png")
