"""Bytes kept for a table's rows are counted by hand and in arrays; the experiment on them runs."""

import csv
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.common import seeds
from experiments.configs import row_states as default_config
from experiments.row_states import tables
from experiments.row_states.tables import CHOICES, REFERENCE, make_configs
from tests.support.programs import TINY
from ultramem_jax import ModelConfig, TrainConfig, UserError
from ultramem_jax.accounting import bytes_per_token, optimizer_bytes, row_bytes
from ultramem_jax.config.row_states import ROW_OPTIMIZERS
from ultramem_jax.ops.rows import stored_dtype
from ultramem_jax.presets import families
from ultramem_jax.training.row_rules import row_rule

# A value 6 wide, and a pre-value 4 wide.
VALUES = families.ultramem(value_dim=6, num_keys=16)
BOTH = VALUES.changed(pre_value_dim=4)
BASE = default_config.get_config()


@pytest.mark.parametrize(
    ("memory", "table", "moments"),
    [
        (VALUES, 4 * 6, {"element": (8 * 6, 4 * 6), "row": (4 * 6 + 4, 2 * 6 + 4)}),
        (BOTH, 4 * 10, {"element": (8 * 10, 4 * 10), "row": (4 * 10 + 2 * 4, 2 * 10 + 2 * 4)}),
    ],
)
def test_bytes_of_a_row_by_hand(memory, table, moments):
    halves = memory.changed(dtype="bfloat16")
    assert row_bytes(memory.table).total == table + moments["element"][0] == 3 * table
    for second, by_dtype in moments.items():
        for dtype, expected in zip(("float32", "bfloat16"), by_dtype, strict=True):
            train = TrainConfig(row_second_moment=second, row_moment_dtype=dtype)
            found = row_bytes(memory.table, train)
            assert (found.table, found.moments, found.total) == (table, expected, table + expected)
            assert row_bytes(halves.table, train) == dataclasses.replace(found, table=table // 2)


# Bytes of the state of a value 6 wide and a pre-value 4 wide.
KEPT = {
    "adamw": 8 * 10,
    "adamw_catch_up": 8 * 10 + 2 * 4,
    "adagrad": 4 * 10,
    "adagrad_row": 2 * 4,
    "sgd": 0,
    "sgd_momentum": 4 * 10,
}


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
def test_bytes_of_a_row_are_those_of_the_arrays(table_dtype):
    arrays = [jnp.zeros((7, width), stored_dtype(table_dtype)) for width in (6, 4)]
    memory = BOTH.changed(dtype=table_dtype)
    options = {"row_second_moment": ("element", "row"), "row_moment_dtype": ("float32", "bfloat16")}
    seen = set()
    for name, second, dtype in itertools.product(ROW_OPTIMIZERS, *options.values()):
        chosen = dict(zip(options, (second, dtype), strict=True))
        try:
            train = TrainConfig(row_optimizer=name, **chosen)
        except UserError:
            continue  # an option that the rule does not have
        states = [row_rule(train).init(array) for array in arrays]
        found = row_bytes(memory.table, train)
        assert 7 * found.table == sum(array.nbytes for array in arrays)
        assert 7 * found.moments == sum(array.nbytes for array in jax.tree.leaves(states))
        for state in states:
            assert [array.name for array in train.row_arrays] == list(getattr(state, "_fields", ()))
            assert all(len(array) == 7 and not array.any() for array in jax.tree.leaves(state))
        if chosen == {"row_second_moment": "element", "row_moment_dtype": "float32"}:
            assert found.moments == KEPT[name]
        seen.add((name, second, dtype))
    assert len(seen) == 4 + 4 + 2 + 1 + 1 + 2


def test_bytes_of_a_model_follow_its_rows():
    plain = ModelConfig(memories={"memory": BOTH})
    halves = dataclasses.replace(plain, memories={"memory": BOTH.changed(dtype="bfloat16")})
    train = TrainConfig(row_second_moment="row", row_moment_dtype="bfloat16")
    memories, slots, reads = 4, 16**2, 3 * 2 * 16
    before, after = bytes_per_token(plain, 3), bytes_per_token(halves, 3, train=train)
    assert (before.memory, after.memory) == (memories * reads * 40, memories * reads * 20)
    assert (before.dense, before.experts) == (after.dense, after.experts)
    assert before.optimizer - after.optimizer == memories * reads * (80 - 28)
    assert optimizer_bytes(plain) - optimizer_bytes(halves, train) == memories * slots * (80 - 28)
    # Weights that are served in one dtype are so whatever they were trained in.
    assert bytes_per_token(halves, 3, dtype_bytes=4).memory == before.memory


def test_choices_differ_from_each_other_in_the_rows_state_alone():
    configs = make_configs(BASE, list(CHOICES))
    assert list(configs) == list(CHOICES) and configs[REFERENCE] == BASE
    for one, other in itertools.combinations(configs.values(), 2):
        assert one != other
    assert list(make_configs(BASE, ["bfloat16"])) == [REFERENCE, "bfloat16"]
    # What train.py has for the row's state, and for the table.
    last = configs["bfloat16-row-nearest"]
    assert last.model.memory.table.dtype == last.train.row_moment_dtype == "bfloat16"
    assert (last.train.row_second_moment, last.train.row_rounding) == ("row", "nearest")
    whole = last.model.with_memory(BASE.model.memory)
    assert (whole, last.data) == (BASE.model, BASE.data)


def test_a_base_that_leaves_no_choice():
    with pytest.raises(UserError, match="must have one"):
        make_configs(dataclasses.replace(BASE, model=ModelConfig()), [])
    taken = dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, row_rounding="nearest"))
    with pytest.raises(UserError, match="what --choices varies"):
        make_configs(taken, [])
    dense = dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, table_gradient="dense"))
    with pytest.raises(UserError, match="table_gradient"):
        make_configs(dense, list(CHOICES))


def test_table_and_figure_by_hand(tmp_path):
    # The second seed is worse by the same for all, which pairing must take out.
    losses = {name: 2.0 + 0.01 * i for i, name in enumerate(CHOICES)}
    results = {
        name: [{"bits": [9.0, loss + shift], "tokens_per_second": 1000.0} for shift in (0.0, 0.5)]
        for name, loss in losses.items()
    }
    configs = make_configs(BASE, list(CHOICES))
    rows = dict(zip(CHOICES, tables.rows(configs, results), strict=True))
    # d_v 64.
    sizes = {name: (row["table bytes/slot"], row["moment bytes/slot"]) for name, row in rows.items()}
    assert sizes == {
        "full-adam": (256, 512),
        "row-second-moment": (256, 260),
        "bfloat16-moments": (256, 256),
        "bfloat16": (128, 256),
        "bfloat16-row": (128, 132),
        "bfloat16-row-nearest": (128, 132),
        "catch-up": (256, 516),
        "adagrad": (256, 256),
        "adagrad-row": (256, 4),
        "sgd-momentum": (256, 256),
        "sgd": (256, 0),
    }
    assert all(row["bytes/slot"] == sum(sizes[name]) for name, row in rows.items())
    assert rows["full-adam"]["GB of 20,250,000 × 128"] == pytest.approx(20.25e6 * 12 * 128 / 1e9)
    assert rows["bfloat16-row"]["GB of 20,250,000 × 128"] == pytest.approx(20.25e6 * (4 * 128 + 4) / 1e9)
    assert [row["rounding"] for row in rows.values()] == ["", "", *["stochastic"] * 3, "nearest", *[""] * 5]
    assert {name: row["moments"] for name, row in rows.items()} == {
        "full-adam": "2 × float32",
        "row-second-moment": "float32, float32 per row",
        "bfloat16-moments": "2 × bfloat16",
        "bfloat16": "2 × bfloat16",
        "bfloat16-row": "bfloat16, float32 per row",
        "bfloat16-row-nearest": "bfloat16, float32 per row",
        "catch-up": "2 × float32, int32 per row",
        "adagrad": "float32",
        "adagrad-row": "float32 per row",
        "sgd-momentum": "float32",
        "sgd": "",
    }
    # A choice that was not trained has no row.
    some = make_configs(BASE, ["sgd"])
    assert [row["choice"] for row in tables.rows(some, results)] == ["full Adam", "SGD"]
    assert rows["full-adam"]["Δ"] is None
    assert rows["bfloat16"]["Δ"] == pytest.approx(0.03)
    assert rows["bfloat16"]["± (Δ)"] == pytest.approx(0, abs=1e-12)
    assert rows["bfloat16"]["± (val.)"] == pytest.approx(0.5 / 2**0.5)
    figure = tables.plot(configs, results, tmp_path / "figure.png")
    assert figure.stat().st_size > 10_000


def test_two_choices_end_to_end_and_again_without_training(run, text, tmp_path, monkeypatch):
    # Only product keys: this compiles in half the time.
    plain = ["tucker_rank=0", "num_cores=1", "expansion=1", "query_conv_width=0"]
    command = ["row_states", *TINY, *text, *(f"--config.model.memory.{field}" for field in plain)]
    command += ["--choices=bfloat16-row", "--seeds=1"]
    command += [f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"]
    status, out, err = run(*command)
    assert status == 0, err
    folders = [tmp_path / "runs" / f"{name}-seed0" for name in (REFERENCE, "bfloat16-row")]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert [result["config"]["model"]["memories"]["ultramem"]["table"]["dtype"] for result in results] == [
        "float32",
        "bfloat16",
    ]
    assert not list((tmp_path / "runs").rglob("checkpoints"))
    with (tmp_path / "results" / "row_states.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    bits = [result["bits"][-1] for result in results]
    assert [float(row["validation bits/byte"]) for row in rows] == bits
    assert float(rows[1]["Δ"]) == bits[1] - bits[0] and rows[0]["Δ"] == rows[1]["± (Δ)"] == ""
    assert [int(row["bytes/slot"]) for row in rows] == [3 * 4 * 8, 2 * 2 * 8 + 4]
    table = (tmp_path / "results" / "row_states.md").read_text()
    assert "2 steps of 8 × 16 tokens" in table and "launch.py row_states" in table and table.strip() in out
    assert (tmp_path / "results" / "row_states.png").stat().st_size > 10_000

    monkeypatch.setattr(seeds, "train_whole", None)  # the second time nothing is trained
    status, _, err = run(*command)
    assert status == 0, err
    assert (tmp_path / "results" / "row_states.md").read_text() == table
    status, _, err = run(*command, "--config.train.learning_rate=0.5")
    assert status == 2 and "another config" in err


def test_bad_input_gets_one_line(run):
    status, _, err = run("row_states", "--choices=bfloat61")
    assert status == 2 and "did you mean 'bfloat16'" in err and len(err.splitlines()) == 1
    status, _, err = run("row_states", "--preset=dense-tiny")
    assert status == 2 and "model.memory" in err and len(err.splitlines()) == 1
