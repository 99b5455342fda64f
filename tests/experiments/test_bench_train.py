"""`bench_train`: the rows of its table, and what their ratios are made of."""

import csv

import pytest

from experiments.common import machine


def test_rows_are_systems_at_equal_compute(run, tmp_path):
    status, _, err = run(
        "bench_train",
        "--systems=ultramem,dense",
        "--repeats=1",
        "--config.train.batch_size=2",
        "--config.data.seq_len=16",
        f"--out={tmp_path / 'table'}",
    )
    assert status == 0, err
    with (tmp_path / "table.csv").open() as file:
        rows = {row["system"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["ultramem", "ultramem by XLA", "dense"]
    ms = {name: float(row["ms"]) for name, row in rows.items()}
    flops = float(rows["dense"]["FLOPs per token"])
    for name, row in rows.items():
        assert int(row["tokens/s"]) == pytest.approx(2 * 16 * 1e3 / ms[name], abs=0.5)
        assert float(row["FLOPs per token"]) == pytest.approx(flops, rel=0.02)
    # Of a single round, a ratio is that of the medians.
    by_dense = {name: row["times as fast as dense"] for name, row in rows.items()}
    assert float(by_dense["ultramem"]) == pytest.approx(ms["dense"] / ms["ultramem"], rel=1e-9)
    assert float(by_dense["ultramem by XLA"]) == pytest.approx(ms["dense"] / ms["ultramem by XLA"], rel=1e-9)
    assert by_dense["dense"] == ""
    by_xla = {name: row["times as fast as by XLA"] for name, row in rows.items()}
    assert float(by_xla["ultramem"]) == pytest.approx(ms["ultramem by XLA"] / ms["ultramem"], rel=1e-9)
    assert by_xla["ultramem by XLA"] == by_xla["dense"] == ""


def test_systems_that_do_not_fit_together_are_refused_before_anything_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**8)
    status, _, err = run("bench_train", "--systems=ultramem,dense", f"--out={tmp_path / 'table'}")
    assert status == 2 and not list(tmp_path.iterdir())
    assert "systems = ultramem,dense: need " in err and "GB of host memory together, 0.1 GB are free" in err
