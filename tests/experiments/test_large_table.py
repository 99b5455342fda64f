"""`large_table`: what it reads of a training, and what it makes of that."""

import json
import os
import pathlib

from experiments.large_table import readings as large_table
from experiments.large_table.readings import Reading


def _lines(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_times_are_of_steps_that_did_nothing_else(tmp_path, monkeypatch):
    config = {
        "train": {"batch_size": 2, "log_every": 10, "checkpoint_every": 100, "eval_every": 50},
        "data": {"seq_len": 5},
    }
    monkeypatch.setattr(large_table, "_config", lambda workdir: config)
    lines = [{"step": 10 * n, "split": "train", "tokens_per_second": 10.0 * n} for n in range(1, 12)]
    lines.insert(5, {"step": 50, "split": "validation", "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text(_lines(*lines) + '{"step": 1')
    # The first lines are warm-up. The one after step 50 has an evaluation in it, that after 100 a save, too.
    expected = [10 / (10.0 * n) for n in (3, 4, 5, 7, 8, 9, 10)]
    assert large_table.seconds_of_steps(tmp_path) == expected


def test_memory_is_that_of_the_process():
    reading = large_table.reading_of(os.getpid(), "part", 3.0, pathlib.Path("nowhere"))
    assert reading.part == "part" and reading.step == 0
    assert 10**7 < reading.resident_bytes <= reading.peak_bytes
    assert large_table.reading_of(2**22 + 1, "gone", 0.0, pathlib.Path("nowhere")) is None


def test_rows_and_curve(tmp_path):
    readings = [
        Reading("small table", 1.0, 0, 10**9, 2 * 10**9),
        Reading("small table", 2.0, 60, 10**9, 2 * 10**9),
        Reading("until it is stopped", 1.0, 0, 13 * 10**9, 14 * 10**9),
        Reading("resumed", 1.0, 150, 12 * 10**9, 15 * 10**9),
        Reading("resumed", 9.0, 300, 13 * 10**9, 16 * 10**9),
    ]
    small, stopped, resumed = large_table.rows(readings, [0.2, 0.4, 0.3], [0.6])
    assert small["ms per step"] == 300 and small["× small table"] is None
    assert stopped["× small table"] == resumed["× small table"] == 2
    assert resumed["highest resident, GB"] == 16 and resumed["steps"] == "150–300"
    large_table.plot(readings, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 10_000
