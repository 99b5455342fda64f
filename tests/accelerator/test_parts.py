"""The parts that find out about an accelerator run on the CPU with small sizes."""

import json
import sys
import time

import jax
import numpy as np
import pytest

from ultramem_jax.accelerator import parts
from ultramem_jax.accelerator.equality import compare
from ultramem_jax.accelerator.host_tables import WAYS, try_host_table
from ultramem_jax.accelerator.parts import PARTS, Part, records_of, run_all, run_part
from ultramem_jax.accelerator.probe import Timing, probe
from ultramem_jax.accelerator.speed import train_speeds


@pytest.fixture(autouse=True)
def as_for_users():
    """Optax promotes dtypes, as a user's JAX does."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_every_operation_has_several_ways_and_all_work_here():
    found = list(probe(4096))
    assert not [timing for timing in found if timing.error]
    assert all(timing.microseconds > 0 and timing.gigabytes_per_second > 0 for timing in found)
    ways = {}
    for timing in found:
        ways.setdefault(timing.operation, set()).add(timing.way)
    assert {"selection", "sums by row", "sort with order", "best cells", "experts, with gradients"} <= set(
        ways
    )
    assert all(len(of) > 1 for name, of in ways.items() if name not in ("copy", "product"))


def test_the_algorithms_of_a_gpu_train_as_the_cpu_does():
    found = list(compare(("ultramem-demo",), "gpu"))
    assert [row.part for row in found] == ["loss", "params", "tables"]
    assert all(row.holds for row in found), found
    assert all(row.difference > 0 for row in found)  # other sums, so that it is not the same program


def test_speeds():
    (found,) = train_speeds(("dense-tiny",), batch_size=2, seq_len=32, dtype="float32")
    assert found.tokens_per_second == pytest.approx(64 / found.milliseconds * 1e3)
    assert found.utilisation is None and found.temporaries > 0  # a CPU has no published peak


@pytest.mark.parametrize("way", WAYS)
def test_tables_in_host_memory(way):
    found = try_host_table(way, slots=1 << 10, width=8)
    assert found.rows == 32 and found.milliseconds > 0


def test_a_part_writes_after_every_record(tmp_path, monkeypatch):
    def two_and_a_failure(name, small):
        yield Timing("copy", "one", "1", 1.0, 2.0)
        yield Timing("copy", "two", "1", None, None, "RuntimeError: no")
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(parts, "records_of", two_and_a_failure)
    with pytest.raises(RuntimeError):
        run_part("probe", tmp_path, small=True)
    kept = json.loads((tmp_path / "probe.json").read_text())
    assert [row["way"] for row in kept] == ["one", "two"] and kept[1]["error"] == "RuntimeError: no"


def _command(folder, name):
    """A part in a process of its own: it fails, hangs with a child, or leaves a record."""
    record = json.dumps([{"way": name, "ms": 1.5}])
    programs = {
        "fails": "import sys; print('no such device'); sys.exit(3)",
        "hangs": "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)",
        "works": f"open({str(folder / 'works.json')!r}, 'w').write({record!r})",
    }
    return [sys.executable, "-c", programs[name]]


def test_parts_are_run_under_limits_and_reported_one_by_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        parts, "PARTS", tuple(Part(name, f"It {name}", 100) for name in ("fails", "hangs", "works"))
    )
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    well = run_all(tmp_path, 8, lambda name: _command(tmp_path, name), small=False)
    assert not well and time.monotonic() - start < 30
    report = (tmp_path / "README.md").read_text()
    for line in ("| It fails | with status 3", "| It hangs | its time was over", "| It works | well"):
        assert line in report
    assert "1.5" in report and "no such device" in capsys.readouterr().out


def test_what_has_no_time_left_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PARTS", tuple(Part(name, f"It {name}", 420) for name in ("hangs", "works")))
    monkeypatch.chdir(tmp_path)
    assert not run_all(tmp_path, 2, lambda name: _command(tmp_path, name), small=True)
    assert "| It works | no time left" in (tmp_path / "README.md").read_text()


def test_the_parts_fit_into_their_time_in_order_of_value():
    assert [part.name for part in PARTS][:2] == ["probe", "equality"]
    assert sum(part.seconds for part in PARTS) <= 550  # most end before their limits
    assert {part.name for part in PARTS if part.name.startswith("host_")} == {f"host_{way}" for way in WAYS}
    for part in PARTS:
        if not part.arguments and part.name != "probe":
            assert np.iterable(records_of(part.name, small=True))
