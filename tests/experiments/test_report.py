"""Tables hold the numbers given to them, and nothing about who made them."""

import csv
import getpass
import pathlib
import platform
import sys

import jax
import numpy as np
import pytest

from experiments.common import report
from ultramem_jax.reporting import environment, markdown
from ultramem_jax.reporting.environment import describe_environment


def test_environment_names_versions_and_devices(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", "train", "--steps=3"])
    found = describe_environment()
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
        ([str(environment._ROOT / "launch.py"), "bench_step"], "python launch.py bench_step"),
        (
            ["launch.py", "--out=/somewhere/else/runs", "--data", "/a/b/enwik8.gz"],
            "python launch.py --out=runs --data enwik8.gz",
        ),
        (
            ["launch.py", f"--out={environment._ROOT}/experiments/results"],
            "python launch.py --out=experiments/results",
        ),
        (
            ["launch.py", "~/private/config.py", "../place/config.py"],
            "python launch.py config.py config.py",
        ),
        (
            ["launch.py", "x", "--coordinator_address=127.0.0.1:5", "--num_processes=2", "--process_id=0"],
            "python launch.py --processes=2 x",
        ),
        (["launch.py", "--config.title=two words"], "python launch.py '--config.title=two words'"),
        (["-c"], "python -c"),
    ],
)
def test_command_is_told_without_foreign_folders(argv, command):
    assert environment._command(argv) == command


def test_nothing_written_names_host_or_user(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(environment._ROOT / "launch.py"), f"--out={tmp_path}"])
    monkeypatch.setattr(platform, "node", lambda: "host-of-mine")
    markdown, table = report.write_table([{"loss": 1.0}], tmp_path / "t", "Loss", describe_environment())
    text = markdown.read_text() + table.read_text()
    secrets = ["host-of-mine", str(pathlib.Path.home()) + "/", str(tmp_path.parent), str(environment._ROOT)]
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
        {"What it means": ["Little.", "Not much."]},
        {"loss by system": "loss.png"},
    )
    assert markdown.name == "table.v1.md"
    assert markdown.read_text() == (
        "# Loss (nats)\n"
        "\n"
        "| system   |      loss |   slots | met | extra |\n"
        "| :------- | --------: | ------: | --: | ----: |\n"
        "| ultramem |     1.235 | 102,400 | yes |       |\n"
        "| a\\|b     | 1.234e-05 |         |     |   nan |\n"
        "\n"
        "![loss by system](loss.png)\n"
        "\n"
        "Three seeds.\n"
        "\n"
        "## What it means\n"
        "\n"
        "Little.\n"
        "\n"
        "Not much.\n"
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


def test_columns_to_the_left_are_those_of_words_or_those_asked_for():
    rows = [{"model": "a", "size": "1.5 M"}, {"model": "long", "size": "12 M"}]
    assert markdown.table(rows, left=["model"]).splitlines()[1:] == [
        "| :---- | ----: |",
        "| a     | 1.5 M |",
        "| long  |  12 M |",
    ]
    assert markdown.table(rows).splitlines()[1] == "| :---- | :---- |"


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
    assert markdown.significant(value, 4) == text
