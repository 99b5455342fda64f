"""`bench_step`: what it writes, what it leaves out, and that its parts are those of a step."""

import json

import chex
import jax
import numpy as np
import pytest

from experiments.bench_step import study, tables
from experiments.bench_step.memory_step import WAYS, MemoryLayer, Way, bench_config, bench_memory
from experiments.bench_step.parts import PARTS, PartTimes
from experiments.bench_step.study import PartsResult, StepResult
from experiments.common import machine
from experiments.common.machine import Rates
from experiments.common.timing import Need, Timing, groups_that_fit, needed, spread
from ultramem_jax.accounting import PartCost
from ultramem_jax.accounting.step_costs import memory_step_costs

RATES = Rates(flops_per_second=1e9, bytes_per_second=1e8, row_bytes_per_second=1e7)
GB = 10**9


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "measure_rates", lambda: RATES)


def cells(table):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]


def test_a_run_writes_table_numbers_and_figure(run, quick, tmp_path):
    arguments = ["--slots=1024,256", "--tokens=16", "--repeats=2", f"--results={tmp_path}"]
    status, out, err = run("bench_step", *arguments)
    assert status == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {
        f"bench_step.{s}" for s in ("md", "csv", "json", "png")
    }
    text = (tmp_path / "bench_step.md").read_text()
    assert text in out
    header, _, *rows = cells(text.partition("\n## ")[0])
    assert [row[:2] for row in rows] == [[slots, way] for slots in ("256", "1,024") for way in WAYS]
    names = ["ms", "p10–p90", "floor, ms", "times as fast as XLA", "× at 256 slots", "peak, GB"]
    assert [header[i] for i in (2, 3, 4, 6, 9, 10)] == names
    assert all(row[2] and row[4] and not row[-1] for row in rows)
    assert "GPU: not measured here." in text and "launch.py bench_step" in text
    for title in (f"{slots} slots, {way}" for slots in ("256", "1,024") for way in ("native", "XLA")):
        lines = cells(text.partition(f"## Parts, {title}\n")[2].partition("\n## ")[0])
        assert [line[0] for line in lines[2:]] == [part.name for part in PARTS] + [
            "sum, but for ·",
            "whole step",
        ]
    raw = json.loads((tmp_path / "bench_step.json").read_text())
    assert [len(step["timing"]["ms"]) for step in raw["steps"]] == [2] * 10
    assert {len(ms) for parts in raw["parts"] for ms in parts["times"]["ms"].values()} == {2}
    assert raw["rates"]["flops_per_second"] == 1e9 and raw["tokens"] == 16


def test_a_model_is_timed_without_parts(run, quick, tmp_path, monkeypatch):
    # One way is enough, and quicker to compile.
    monkeypatch.setattr(study, "WAYS", {"native": Way()})
    arguments = ["--slots=256", "--tokens=16", "--repeats=1", "--nolayer", "--model"]
    status, _, err = run("bench_step", *arguments, f"--results={tmp_path}")
    assert status == 0, err
    text = (tmp_path / "bench_step_model.md").read_text()
    assert "small language model" in text and "## Parts" not in text
    assert (tmp_path / "bench_step_model.png").exists() and not (tmp_path / "bench_step.md").exists()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--slots=65537", "slots = '65537': must be a square"),
        ("--slots=many", "slots = 'many': must be a square"),
        ("--slots=", "slots = '': must name at least one size"),
        ("--slots=64", "memory.address.top_m = 32"),
        ("--tokens=15", "tokens = 15: must be a multiple of 2"),
        ("--repeats=0", "repeats"),
        ("--nolayer", "layer = False: must be True unless --model is given"),
        ("--memory_gb=11", "memory_gb = 11.0: must be at most what is free, 10.0"),
        ("--memory_gb=1e-6", "memory_gb = 1e-06: no step fits"),
        ("--memory_gb=nan", "memory_gb = nan"),
        ("--slot=256", "slot"),
        ("--redraw", "must hold a .json file of an earlier run"),
    ],
)
def test_bad_input_gets_one_line_before_anything_is_measured(run, tmp_path, monkeypatch, argument, said):
    monkeypatch.setattr(machine, "measure_rates", lambda: pytest.fail("measured"))
    monkeypatch.setattr(machine, "available_bytes", lambda: 10 * GB)
    results = tmp_path / "results"
    status, _, err = run("bench_step", "--slots=256", "--tokens=16", argument, f"--results={results}")
    assert status == 2 and said in err and len(err.splitlines()) == 1
    assert not results.exists()


def test_results_must_be_a_folder(run, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run("bench_step", "--slots=256", "--tokens=16", f"--results={tmp_path / 'file'}")
    assert status == 2 and "results = " in err and len(err.splitlines()) == 1


def test_steps_are_grouped_by_what_fits_together():
    needs = {"a": Need(6), "b": Need(2), "c": Need(6, 3)}
    # One of them runs at a time, so only the largest transient counts.
    assert needed(list(needs.values())) == 17 and needed([Need(1, 5), Need(2, 3)]) == 8
    assert groups_that_fit(needs, None) == groups_that_fit(needs, 17) == [["a", "b", "c"]]
    assert groups_that_fit(needs, 16) == [["a", "b"], ["c"]]
    assert groups_that_fit(needs, 8) == [["a", "b"]]
    assert groups_that_fit(needs, 6) == [["a"], ["b"]]
    assert groups_that_fit(needs, 1) == []


def test_what_does_not_fit_is_known_before_anything_is_built():
    table_bytes = 16384 * 128 * 4
    fits = study.plan(128, 16, 4 * table_bytes, model=False)
    # Tables and moments of both are four tables, so that their dense parameters find no room.
    assert fits.groups == [["native bf16", "XLA bf16"], ["native"], ["XLA"]]
    assert fits.dissected == ("native", "XLA")
    assert fits.contenders["dense"].table_bytes == table_bytes
    # Table, two moments and a gradient, besides dense parameters and theirs.
    assert 4 * table_bytes < needed([fits.contenders["dense"].need]) < 5 * table_bytes
    halves = study.plan(128, 16, 2 * table_bytes, model=False)
    assert halves.groups == [["native bf16"], ["XLA bf16"]]
    assert halves.dissected == ("native bf16", "XLA bf16")
    assert study.plan(128, 16, None, model=True).dissected == ()


def _study(steps, parts=()):
    return tables.Study(
        name="bench_step",
        title="Title",
        about="A layer",
        memory=bench_memory(16, Way()),
        tokens=16,
        repeats=3,
        memory_limit=GB,
        rates=RATES,
        environment={"command": "python"},
        steps=list(steps),
        parts=list(parts),
        lookups=[],
    )


def step(slots, way, ms=None, beside=()):
    timing = None if ms is None else Timing([ms - 1, ms, ms + 1], 3 * GB, GB // 10)
    # 1e7 FLOPs at 1e9 a second take 10 ms.
    return StepResult(slots, way, GB, 51 * GB, PartCost(10**7, 1000), timing, beside)


def test_rows_hold_ratios_and_say_what_was_left_out():
    rows = tables.step_rows(
        _study(
            [
                step(256, "native", 20.0, ("dense",)),
                step(256, "native bf16", 15.0),
                step(256, "dense", 40.0, ("native",)),
                step(1024, "native", 30.0),
                step(1024, "dense"),
            ]
        ),
        on_cpu=True,
    )
    first, half, dense, larger, left_out = rows
    assert (first["ms"], first["floor, ms"], first["× floor"], first["× dense"]) == (20, 10, 2, 0.5)
    assert first["p10–p90"] == "19.20–20.80" and first["temporaries, % of table"] == 10
    assert larger["× at 256 slots"] == 1.5 and larger["× dense"] is None and larger["note"] is None
    assert half["note"] == "not in turns with native, dense"
    assert first["note"] == dense["note"] == "not in turns with native bf16"
    assert left_out["note"] == "does not fit: 51 GB" and left_out["ms"] is None
    assert left_out["floor, ms"] == 10 and left_out["GPU, ms"] is None
    assert "GPU, ms" not in tables.step_rows(_study([step(256, "dense", 1.0)]), on_cpu=False)[0]


def test_parts_are_differences_where_they_cannot_be_timed_alone():
    series = {name for part in PARTS for name in (part.series, *part.less)}
    times = PartTimes({name: [1.0, 2.0, 3.0] for name in series}, [100] * 3)
    times.ms["retrieval"][:] = [4.0, 8.0, 12.0]
    costs = memory_step_costs(bench_config(16, Way(), 16), 16)
    rows = tables.part_rows(
        _study([step(256, "native", 40.0)], [parts := PartsResult(256, "native", costs, times)]),
        parts,
    )
    by_part = {row["part"]: row for row in rows}
    assert by_part["grid (retrieval - the two above)"]["ms"] == 4
    assert by_part["backward (with forward - forward)"]["ms"] == 0
    assert by_part["query"]["floor, ms"] == pytest.approx(1e3 * costs["query"].bytes / 1e8)
    assert by_part["norm of the keys"]["floor, ms"] is None
    # Nine parts of 2 ms each, the grid's 4 and a backward pass of none.
    summed = by_part["sum, but for ·"]["ms"]
    assert summed == 2 * (sum(part.in_sum for part in PARTS) - 2) + 4
    assert by_part["whole step"]["% of the step"] == 100


def test_median_and_percentiles():
    assert spread([5.0, *map(float, range(11))]) == (5.0, pytest.approx(1.1), pytest.approx(8.9))


def test_all_ways_of_training_find_the_same_gradient():
    moments = {}
    for name in ("native", "XLA", "dense"):
        layer = MemoryLayer(bench_config(16, WAYS[name], 16))
        state, batch = jax.jit(layer.init)(), layer.draw(jax.random.key(0), 16)
        state, by_x = jax.jit(WAYS[name].traced(layer.step), donate_argnums=0)(state, batch)
        arrays, (table,) = jax.tree.leaves(state.table_state), jax.tree.leaves(state.tables)
        first = next(array for array in arrays if array.shape == table.shape)
        # Moments of the dense parameters, not these: Adam's first step divides a gradient by its own size.
        moments[name] = first, by_x, state.opt_state
    assert np.abs(moments["dense"][0]).max() > 0
    chex.assert_trees_all_close(moments["native"], moments["dense"], rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(moments["native"], moments["XLA"], rtol=1e-4, atol=1e-7)


def test_rates_are_measured_and_memory_is_known():
    rates = machine.measure_rates(side=64, array_bytes=1 << 16, tokens=2)
    assert min(rates.flops_per_second, rates.bytes_per_second, rates.row_bytes_per_second) > 0
    assert machine.available_bytes() is None or machine.available_bytes() > 0
