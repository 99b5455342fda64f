import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.support.assertions import assert_same_bits
from tests.support.checkpoint_states import abstract
from tests.support.drawn import drawn_state
from tests.support.paths import ROOT
from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.parallel.mesh import one_device as alone
from ultramem_jax.presets import families
from ultramem_jax.training import checkpoint_reading, large_arrays, loop, undo_log
from ultramem_jax.training import checkpoints as module
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.manifest import find_damage
from ultramem_jax.training.restore import load_model
from ultramem_jax.training.undo_log import LiveView, UndoLog, UndoRows, put_back


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two arrays per table, values and pre-values, of which a step reads some rows."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text(" ".join(rng.choice(["memory", "slot", "key", "\n", "value;"], 3000)))
    memory = families.ultramem_v2(
        placement="1:1",
        sharing="none",
        num_keys=24,
        top_m=4,
        num_heads=1,
        key_dim=8,
        value_dim=8,
        pre_value_dim=4,
    )
    model = ModelConfig(
        embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16, memories={"memory": memory}
    )
    data = DataConfig("text", str(folder / "text.txt"), seq_len=16, cache_dir=str(folder / "cache"))
    train = TrainConfig(
        steps=7, batch_size=4, learning_rate=1e-2, warmup_fraction=0.0, eval_batches=1, checkpoint_every=2
    )
    return RunConfig(model, data=data, train=train)


@pytest.fixture(scope="module")
def optimizers(config):
    return make_optimizers(config)


@pytest.fixture
def large(monkeypatch):
    """Every table counts as large."""
    monkeypatch.setattr(undo_log, "LIVE_BYTES", 0)
    monkeypatch.setattr(undo_log, "_LOG_SHARE", 10.0)


@pytest.fixture
def held(monkeypatch, large):
    """The writer reads moments (and pre-values) only when this is set, or somebody waits for it."""
    released = threading.Event()
    write, wait = ocp.type_handlers.NumpyHandler._open_and_write, Checkpoints.wait

    async def held_write(self, value, tspec, *rest):
        if "table_state" in str(tspec) or "pre_values" in str(tspec):
            await asyncio.to_thread(released.wait)
        await write(self, value, tspec, *rest)

    def releasing_wait(self):
        released.set()
        wait(self)
        released.clear()

    monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "_open_and_write", held_write)
    monkeypatch.setattr(Checkpoints, "wait", releasing_wait)
    return released


def batches(count, sequences=4):
    """Few tokens, so that steps write some rows, and many of them again."""
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.integers(0, 40, (sequences, 17)), jnp.int32) for _ in range(count)]


def save(checkpoints, step, state):
    checkpoints.save(step, state, None, {}, {}, recorded=True)


def bits(tree):
    return jax.tree.map(np.array, tree)


def pointers(state):
    return [a.unsafe_buffer_pointer() for a in jax.tree.leaves((state.tables, state.table_state))]


# ---- while a save is in flight


@pytest.mark.parametrize("pieces", ["whole", "of three rows"])
def test_steps_during_a_save_leave_no_trace_in_it(config, optimizers, held, tmp_path, monkeypatch, pieces):
    if pieces == "of three rows":  # of 576: pieces that log entries begin and end in
        monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 8 * 4)
        monkeypatch.setattr(large_arrays, "_PIECE_BYTES", 3 * 8 * 4)
    state = drawn_state(config)
    with Checkpoints(tmp_path) as checkpoints:
        step = loop._StepFunction(config, optimizers, alone(), state, checkpoints)
        for tokens in batches(3):
            state, _ = step(state, tokens)
        expected, places = bits(state), pointers(state)
        save(checkpoints, 3, state)
        for tokens in batches(5)[1:]:  # the first two of these are known
            state, _ = step(state, tokens)
            assert pointers(state) == places
        checkpoints.wait()
        assert checkpoints._log is None
        state, _ = step(state, batches(6)[5])  # after it, not recorded
        restored = checkpoints.restore(abstract(state))
        part = checkpoints.restore_subtree({"tables": abstract(state.tables)})
    assert_same_bits(restored.state, expected)
    assert_same_bits(part.state, {"tables": expected.tables})

    # The premise: rows of several steps were undone, and not all rows were.
    undo = UndoRows(tmp_path / "3" / "undo.npz")
    name = "table_state.memory_0.values.second"
    slots = [slots for slots, _ in undo.read(name)]
    assert len(slots) > 1
    assert len(np.unique(np.concatenate(slots))) == sum(map(len, slots)) < 576
    monkeypatch.setattr(checkpoint_reading, "UndoRows", lambda _: UndoRows(tmp_path / "none"))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        mixed = checkpoints.restore(abstract(expected)).state
    without = dict(table_state=None, tables=None)
    assert_same_bits(mixed.replace(**without), expected.replace(**without))
    differs = (
        mixed.table_state["memory_0"]["values"].second != expected.table_state["memory_0"]["values"].second
    )
    chex.assert_trees_all_equal(np.flatnonzero(differs.any(1)), np.sort(np.concatenate(slots)))


@pytest.mark.parametrize("rule", ["adamw_catch_up", "sgd"])
def test_whatever_a_rule_keeps_is_undone(config, held, tmp_path, rule):
    # Integers, one for each row; and nothing at all.
    config = replace(config, train=replace(config.train, row_optimizer=rule))
    optimizers = make_optimizers(config)
    state = drawn_state(config)
    with Checkpoints(tmp_path) as checkpoints:
        step = loop._StepFunction(config, optimizers, alone(), state, checkpoints)
        state, _ = step(state, batches(1)[0])
        expected, places = bits(state), pointers(state)
        save(checkpoints, 1, state)
        for tokens in batches(3)[1:]:
            state, _ = step(state, tokens)
            assert pointers(state) == places
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state))
    assert_same_bits(restored.state, expected)
    undo = UndoRows(tmp_path / "1" / "undo.npz")
    kept = [f"table_state.memory_0.values.{array.name}" for array in config.train.row_arrays]
    assert all(len(undo.read(name)) == 2 for name in ("tables.memory_0.values", *kept))


def test_a_run_ends_as_one_that_waits_for_its_saves(config, held, one_device, tmp_path, monkeypatch):
    recorded = loop.train(config, tmp_path / "recorded", progress=False)
    logs = [path.parent.name for path in tmp_path.glob("recorded/checkpoints/*/undo.npz")]
    assert logs == ["6"]  # of the two that are kept; after the last one no step was done
    loaded = load_model(tmp_path / "recorded", 6)

    save = Checkpoints.save

    def save_and_wait(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait()

    monkeypatch.setattr(Checkpoints, "save", save_and_wait)
    plain = loop.train(config, tmp_path / "plain", progress=False)
    assert not list(tmp_path.rglob("plain/**/undo.npz"))
    assert_same_bits(recorded.state, plain.state)
    assert_same_bits(loaded.variables, load_model(tmp_path / "plain", 6).variables)

    for path in sorted((tmp_path / "recorded" / "checkpoints" / "7").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    resumed = loop.train(config, tmp_path / "recorded", progress=False)
    assert_same_bits(resumed.state, plain.state)


def test_a_long_log_waits_for_the_writer(config, optimizers, held, tmp_path, monkeypatch):
    monkeypatch.setattr(undo_log, "_LOG_SHARE", 0.0)
    state = drawn_state(config)
    with Checkpoints(tmp_path) as checkpoints:
        step = loop._StepFunction(config, optimizers, alone(), state, checkpoints)
        expected = bits(state)
        save(checkpoints, 1, state)
        state, _ = step(state, batches(1)[0])
        assert checkpoints._log is None and checkpoints.all_steps() == [1]
        assert_same_bits(checkpoints.restore(abstract(state)).state, expected)


def test_dense_tables_are_saved_without_a_log(config, large, one_device, tmp_path):
    dense = replace(config, train=replace(config.train, table_gradient="dense", steps=3))
    result = loop.train(dense, tmp_path, progress=False)
    assert not list(tmp_path.rglob("undo.npz"))
    assert_same_bits(loop.train(dense, tmp_path, progress=False).state, result.state)


# ---- what goes wrong


def test_an_interrupt_comes_after_the_record(interruptible, config, optimizers, held, tmp_path, monkeypatch):
    state = drawn_state(config)
    expected = bits(state)
    record = UndoLog.record

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        record(self, *args)

    monkeypatch.setattr(UndoLog, "record", interrupted)
    with pytest.raises(KeyboardInterrupt), Checkpoints(tmp_path) as checkpoints:
        step = loop._StepFunction(config, optimizers, alone(), state, checkpoints)
        save(checkpoints, 1, state)
        state, _ = step(state, batches(1)[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(expected)).state, expected)


def test_a_step_that_fails_costs_only_the_save(config, optimizers, held, tmp_path, monkeypatch, caplog):
    state = drawn_state(config)
    expected = bits(state)

    def fail(*_):
        raise MemoryError("no room for the record")

    with pytest.raises(MemoryError, match="no room"), Checkpoints(tmp_path) as checkpoints:
        step = loop._StepFunction(config, optimizers, alone(), state, checkpoints)
        save(checkpoints, 1, state)
        checkpoints.wait()
        save(checkpoints, 2, state)
        monkeypatch.setattr(UndoLog, "record", fail)
        step(state, batches(1)[0])
    assert "the save in flight failed: a step failed while the checkpoint was written" in caplog.text
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [1]
        assert_same_bits(checkpoints.restore(abstract(expected)).state, expected)


@pytest.mark.parametrize("what", ["a table", "the log"])
def test_what_cannot_be_written_costs_only_the_save(config, optimizers, held, tmp_path, monkeypatch, what):
    state = drawn_state(config)
    expected = bits(state)

    def fail(*_):
        raise OSError("disk full")

    async def fail_in_orbax(*_):
        fail()

    monkeypatch.setattr(module, "_ABANDONED", [])
    with Checkpoints(tmp_path) as checkpoints:
        step = loop._StepFunction(config, optimizers, alone(), state, checkpoints)
        save(checkpoints, 1, state)
        checkpoints.wait()
        if what == "a table":
            monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "_open_and_write", fail_in_orbax)
        else:
            monkeypatch.setattr(UndoLog, "write", fail)
        save(checkpoints, 2, state)
        state, _ = step(state, batches(1)[0])
        with pytest.raises(OSError, match="disk full"):
            checkpoints.wait()
        assert len(module._ABANDONED) == (what == "a table")  # whose neighbours may be read still
        step(state, batches(1)[0])
        assert_same_bits(checkpoints.restore(abstract(expected)).state, expected)
        assert checkpoints.all_steps() == [1]


def test_tables_that_move_are_an_error(config, optimizers, held, tmp_path):
    state = drawn_state(config)
    with pytest.raises(RuntimeError, match=r"not updated in place .*: tables\.memory_0\.values$"):  # noqa: SIM117
        with Checkpoints(tmp_path) as checkpoints:
            step = loop._StepFunction(config, optimizers, alone(), state, checkpoints)
            save(checkpoints, 1, state)
            reader = np.asarray(state.tables["memory_0"]["values"])  # which XLA knows of
            step(state, batches(1)[0])
    assert reader.any()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == []


def test_damage_to_the_log_is_found(config, optimizers, held, tmp_path):
    state = drawn_state(config)
    with Checkpoints(tmp_path) as checkpoints:
        step = loop._StepFunction(config, optimizers, alone(), state, checkpoints)
        save(checkpoints, 1, state)
        step(state, batches(1)[0])
    (tmp_path / "1" / "undo.npz").unlink()
    assert find_damage(tmp_path / "1") == "undo.npz is missing"


# ---- parts


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_first_record_of_a_row_counts(dtype, tmp_path):
    arrays = {"m": {"values": jnp.arange(20, dtype=dtype).reshape(10, 2)}}
    moments = {"m": {"values": {"scale": jnp.arange(10, dtype=jnp.float32)}}}
    log = UndoLog(arrays, moments)
    now = np.array(arrays["m"]["values"]), np.array(moments["m"]["values"]["scale"])
    expected = tuple(a.copy() for a in now)
    for slots in ([1, 4, 9, 10, 10], [0, 1, 9, 10, 12], [1, 4, 11, 12, 13]):
        slots = np.array(slots, np.int32)
        clipped = np.minimum(slots, 9)
        rows = tuple(jnp.asarray(a[clipped]) for a in now)
        before = {"m": {"values": undo_log.RowsBefore(jnp.asarray(slots), (rows[0], {"scale": rows[1]}))}}
        with log.step() as open_log:
            open_log.record(arrays, moments, before)
        for a in now:
            a[slots[slots < 10]] += 1
    log.close()
    with log.step() as closed:
        assert closed is None
    log.write(tmp_path / "undo.npz")
    undo = UndoRows(tmp_path / "undo.npz")
    names = ("tables.m.values", "table_state.m.values.scale")
    assert [[s.tolist() for s, _ in undo.read(n)] for n in names] == [[[1, 4, 9], [0]]] * 2
    for name, array, want in zip(names, now, expected, strict=True):
        for first in range(0, 10, 4):
            rows = slice(first, first + 4)
            for columns in ([slice(0, 1)], [slice(1, 3)]) if array.ndim > 1 else ([],):
                place = (rows, *columns)
                put_back(array[place], place, array.shape, undo.read(name))
        chex.assert_trees_all_equal(array, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_live_view_is_the_arrays_memory(dtype):
    array = jnp.arange(12, dtype=dtype).reshape(3, 4)
    view = LiveView.of(array)
    chex.assert_type(view, array.dtype)
    # Not beside the array: once NumPy looked at one in bfloat16, jax 0.11 no longer donates its buffer.
    chex.assert_trees_all_equal(view, np.arange(12).reshape(3, 4))
    changed = jax.jit(lambda a: a.at[1].set(7), donate_argnums=0)(array).block_until_ready()
    chex.assert_trees_all_equal(view, changed)
    assert view[1, 0] == 7


def test_arrays_on_many_devices_are_not_viewed(large):
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("a",)), jax.P())
    table = jnp.ones((4, 2))
    assert undo_log.is_worth_it({"t": table}, {})
    assert not undo_log.is_worth_it({"t": jax.device_put(table, everywhere)}, {})


# ---- memory

MEASURED = """
    import gc, os, pathlib, sys
    from dataclasses import replace
    import jax
    jax.config.update("jax_platforms", "cpu")
    import numpy as np
    from ultramem_jax.presets import families
    from ultramem_jax.config import ModelConfig, RunConfig, TrainConfig
    from ultramem_jax.training import undo_log
    from ultramem_jax.training.checkpoints import Checkpoints
    from ultramem_jax.training.loop import _StepFunction
    from ultramem_jax.training.dense_optimizer import make_optimizers
    from ultramem_jax.parallel.mesh import one_device
    from ultramem_jax.training.state import init_state

    undo_log.LIVE_BYTES = 0

    def megabytes(field):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    def peak(work):
        gc.collect()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = megabytes("VmRSS")
        work()
        return megabytes("VmHWM") - before

    small = dict(placement="1:1", key_dim=8, top_m=4, num_heads=1)
    memory = families.ultramem(num_keys=512, value_dim=128, **small)
    model = ModelConfig(embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=16)
    model = replace(model, memories={"memory": memory})
    config = RunConfig(model, train=TrainConfig(batch_size=2))
    optimizers, tokens = make_optimizers(config), np.ones((2, 9), np.int32)
    state = jax.jit(lambda: init_state(config, optimizers))()
    tables = sum(a.nbytes for a in jax.tree.leaves((state.tables, state.table_state))) / 2**20
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    with Checkpoints(sys.argv[1]) as checkpoints:
        step = _StepFunction(config, optimizers, one_device(), state, checkpoints)
        state, _ = step(state, tokens)
        checkpoints.save(1, state, None, {}, {}, recorded=True)
        if checkpoints._log is not None:
            state, _ = step(state, tokens)  # compiled
        checkpoints.wait()

        def steps_while_saving():
            global state
            checkpoints.save(2, state, None, {}, {}, recorded=True)
            for _ in range(3):
                state, _ = step(state, tokens)
            checkpoints.wait()

        saving = peak(steps_while_saving)
        del state
        kept = []
        restoring = peak(lambda: kept.append(checkpoints.restore(abstract)))
    print(tables, saving, restoring)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory come from Linux")
def test_no_second_copy_of_the_tables_while_saving_or_restoring(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), str(tmp_path)]
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | cache)
    assert done.returncode == 0, done.stderr
    tables, saving, restoring = map(float, done.stdout.split())
    assert tables > 380
    assert saving < 0.5 * tables, done.stdout
    assert restoring < 1.5 * tables, done.stdout


@pytest.mark.usefixtures("without_kernels")  # kernels do not serve the host's memory
@pytest.mark.parametrize("restored_to", ["device", "pinned_host"])
def test_tables_in_the_hosts_memory_are_saved_and_restored_so_too(
    config, held, one_device, tmp_path, monkeypatch, restored_to
):
    monkeypatch.setattr(checkpoint_reading, "LARGE_BYTES", 5000)  # tables, not scalars
    on_host = config.model.memory.changed(memory_kind="pinned_host")
    on_host = replace(config, model=replace(config.model, memories={"memory": on_host}))
    whole = loop.train(on_host, tmp_path / "run", progress=False)
    assert (tmp_path / "run/checkpoints/6/undo.npz").exists()
    for path in sorted((tmp_path / "run/checkpoints/7").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    other = on_host if restored_to == "pinned_host" else config
    resumed = loop.train(other, tmp_path / "run", progress=False)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(resumed.state.tables)} == {restored_to}
    assert_same_bits(resumed.state, whole.state)
