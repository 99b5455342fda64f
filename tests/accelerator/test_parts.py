"""The parts that find out about an accelerator run on the CPU with small sizes."""

import contextlib
import json
import pathlib
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from tests.support import engram_states, synthetic
from ultramem_jax.accelerator import equality, parts
from ultramem_jax.accelerator.equality import Difference, compare, compare_references
from ultramem_jax.accelerator.host_tables import WAYS, try_host_table
from ultramem_jax.accelerator.parts import PARTS, Part, records_of, run_all, run_part
from ultramem_jax.accelerator.probe import Timing, _candidates, _selection, _sorts, _sums, probe
from ultramem_jax.accelerator.speed import train_speeds
from ultramem_jax.errors import UserError
from ultramem_jax.interop.reference_torch import load
from ultramem_jax.ops.algorithms import choosing


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
    # Other sums, so it is not the same program. The few losses may still round to the same numbers.
    assert all(row.difference > 0 for row in found if row.part != "loss")


def test_a_number_that_is_not_finite_does_not_hold(monkeypatch):
    ones = {"loss": [1.0], "params": np.ones(3), "tables": np.ones(2)}
    spoiled = ones | {"tables": np.array([1.0, np.nan])}
    monkeypatch.setattr(
        equality, "_train", lambda config, device, target: spoiled if target == "gpu" else ones
    )
    assert [row.holds for row in compare(("ultramem-tiny",), "gpu")] == [True, True, False]


def _layer(kind):
    """Hyper-parameters and state dict of a layer, x, and further inputs by name."""
    if kind == "engram":
        hyper, state, x, tokens = engram_states.case(next(iter(engram_states.CASES)))
        return hyper, state, x, {"token_ids": tokens}
    name = next(name for name, hyper in synthetic.CASES.items() if hyper["layer"] == kind)
    hyper, state, x, _ = synthetic.case(name)
    return hyper, state, x, {}


@pytest.mark.parametrize("kind", ["v1", "v2", "memory_plus", "engram"])
def test_references(kind, tmp_path):
    hyper, state, x, more = _layer(kind)
    module, variables = load(state, hyper)
    y = np.asarray(module.apply(variables, x, *more.values()))
    cotangent = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    by_x = jax.grad(lambda x: (module.apply(variables, x, *more.values()) * cotangent).sum())(x)
    gradients = {f"grad.{key}": np.zeros(1) for key in state if not key.endswith(equality._BUFFERS)}
    arrays = state | gradients | more | {"x": x, "output": y, "cotangent": cotangent, "grad.x": by_x}
    np.savez(tmp_path / "layer.npz", **arrays)
    (tmp_path / "layer.json").write_text(json.dumps(hyper))
    np.savez(tmp_path / "other.npz", **{"r2.step0.svd_u": np.ones(2)})
    found = list(compare_references(tmp_path))
    assert [(row.model, row.part) for row in found] == [("layer", "output"), ("layer", "gradient by x")]
    assert all(row.holds for row in found)
    np.savez(tmp_path / "layer.npz", **arrays | {"output": 1.001 * y})
    assert [row.holds for row in compare_references(tmp_path)] == [False, True]


def test_what_does_not_hold_ends_a_part_with_an_error_after_all_records(tmp_path, monkeypatch):
    def differences(name, small, references):
        yield Difference("one", "loss", 1.0, 0.1, False)
        yield Difference("two", "loss", 0.0, 0.1, True)

    monkeypatch.setattr(parts, "records_of", differences)
    with pytest.raises(UserError, match="1 of 2 do not hold"):
        run_part("equality", tmp_path, small=True)
    assert [row["holds"] for row in json.loads((tmp_path / "equality.json").read_text())] == [False, True]


def test_ways_are_different_programs():
    programs = {}
    for candidates in (_selection, _sums, _sorts, _candidates):
        for candidate in candidates(4096):
            with choosing(**candidate.algorithms):
                text = jax.jit(candidate.function).lower(*candidate.arguments).as_text()
            programs.setdefault((candidate.operation, candidate.shape), []).append(text)
    for key, texts in programs.items():
        assert len(set(texts)) == len(texts), key


def test_speeds():
    (found,) = train_speeds(("dense-tiny",), batch_size=2, seq_len=32, dtype="float32")
    assert found.tokens_per_second == pytest.approx(64 / found.milliseconds * 1e3)
    assert found.utilisation is None and found.temporaries > 0  # a CPU has no published peak


@pytest.mark.parametrize("way", WAYS)
def test_tables_in_host_memory(way):
    found = try_host_table(way, slots=1 << 10, width=8)
    assert found.rows == 32 and found.milliseconds > 0


def test_a_part_writes_after_every_record(tmp_path, monkeypatch):
    def two_and_a_failure(name, small, references):
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
    # The child does not end by SIGTERM.
    child = f"subprocess.Popen(['sh', '-c', 'trap : TERM; touch {folder}/alive; sleep 60 & wait; sleep 60']);"
    programs = {
        "fails": "import sys; print('no such device'); sys.exit(3)",
        "hangs": f"import subprocess, time; {child} time.sleep(60)",
        "leaves": f"import subprocess; {child}",
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


def _commands():
    """Command lines of all processes of this machine."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace"))
    return found


@pytest.mark.skipif(not pathlib.Path("/proc/self/cmdline").exists(), reason="no /proc")
@pytest.mark.parametrize("name", ["hangs", "leaves"])
def test_nothing_that_a_part_started_is_left(name, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(parts, "PARTS", (Part(name, f"It {name}", 420),))
    monkeypatch.chdir(tmp_path)
    run_all(tmp_path, 4, lambda name: _command(tmp_path, name), small=True)
    assert (tmp_path / "alive").exists()
    until = time.monotonic() + 10
    while any(str(tmp_path / "alive") in command for command in _commands()):
        assert time.monotonic() < until, "a child of the part is left"
        time.sleep(0.05)


def test_sigterm_ends_the_part_and_writes_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(parts, "PARTS", tuple(Part(name, f"It {name}", 420) for name in ("works", "hangs")))
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(2, signal.raise_signal, [signal.SIGTERM])
    timer.start()
    with pytest.raises(SystemExit):
        run_all(tmp_path, 60, lambda name: _command(tmp_path, name), small=True)
    assert signal.getsignal(signal.SIGTERM) == before
    report = (tmp_path / "README.md").read_text()
    assert "| It works | well" in report and "| It hangs | its time was over" in report


def test_what_an_earlier_call_found_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PARTS", (Part("fails", "It fails", 420),))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fails.json").write_text(json.dumps([{"way": "of another card"}]))
    assert not run_all(tmp_path, 60, lambda name: _command(tmp_path, name), small=True)
    assert "of another card" not in (tmp_path / "README.md").read_text()


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
            assert np.iterable(records_of(part.name, small=True, references=None))
