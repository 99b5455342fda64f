"""Tables hold the numbers given to them, and nothing about who made them."""

import csv
import getpass
import pathlib
import platform
import sys

from experiments.common import report
from ultramem_jax.reporting import environment
from ultramem_jax.reporting.environment import describe_environment


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
