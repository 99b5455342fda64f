import os
import shutil
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import chex
import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.assertions import assert_same_bits
from ultramem_jax.config import ModelConfig, RunConfig, to_dict
from ultramem_jax.errors import UserError
from ultramem_jax.presets import families
from ultramem_jax.training import checkpoint_reading, large_arrays, manifest
from ultramem_jax.training import checkpoints as module
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.manifest import find_damage

CONFIG = to_dict(RunConfig())
CORPUS = {"name": "stdlib", "sha256": "0123abcd"}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    tables: dict
    buffers: dict
    rng: jax.Array


def make_state(seed=0, width=8, sharding=None):
    """A state with every kind of leaf: bfloat16, float32, int32, uint32, bool, scalars, empty nodes."""
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": jnp.asarray(rng.standard_normal((4, width)), jnp.bfloat16)},
        "bias": jnp.asarray(rng.standard_normal(width), jnp.float32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = State(
        step=jnp.asarray(seed, jnp.int32),
        params=params,
        opt_state=jax.tree.map(lambda x: x + jnp.asarray(seed, x.dtype), optimizer.init(params)),
        tables={"memory_0": jnp.asarray(rng.standard_normal((64, width)), jnp.float32)},
        buffers={"shuffle": jnp.asarray(rng.permutation(64), jnp.uint32), "used": jnp.arange(64) % 3 == 0},
        rng=jax.random.key_data(jax.random.key(seed)),
    )
    return state if sharding is None else jax.device_put(state, sharding)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def save_all(directory, losses, **kept):
    """Saves steps 10, 20, ... with the given validation losses, state `make_state(step)`."""
    with Checkpoints(directory, **kept) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            checkpoints.save(10 * step, make_state(10 * step), None, CONFIG, CORPUS)
            if loss is not None:
                checkpoints.mark(10 * step, loss)  # the save is in flight


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints of steps 10 and 20. Copy it before damaging it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_all(directory, [2.0, 1.0], keep_last=2, keep_best=0)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(module.log, "warning", lambda text, *values: lines.append(text % values))
    return lines


# ---- round trips


def test_round_trip_is_bit_for_bit(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract(make_state()), expect_config=CONFIG)
    assert_same_bits(restored.state, make_state(20))
    assert (restored.step, restored.skipped) == (20, ())
    assert (restored.meta.step, restored.meta.config, restored.meta.corpus) == (20, CONFIG, CORPUS)
    assert restored.meta.validation_loss == 1.0
    assert restored.meta.versions["jax"] == jax.__version__


def test_a_given_step_is_restored(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(make_state()), step=10).state, make_state(10))
        assert checkpoints.read_meta(10).validation_loss == 2.0
        with pytest.raises(
            UserError, match=r"no checkpoint of step 15 in .*: it holds checkpoints of step 10, 20"
        ):
            checkpoints.restore(abstract(make_state()), step=15)


def test_donation_right_after_save_leaves_the_checkpoint_alone(tmp_path):
    state = {"table": jnp.arange(2**21, dtype=jnp.float32).reshape(-1, 64), "flat": jnp.ones(7)}
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(partial(jax.tree.map, lambda x: x * 0.0 - 1.0), donate_argnums=0)
    spare = jax.tree.map(jnp.copy, state)
    jax.block_until_ready(overwrite(spare))  # compiled, so that it comes at once
    assert spare["table"].is_deleted()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, None, CONFIG, CORPUS)
        state = jax.block_until_ready(overwrite(state))
        assert float(state["table"].max()) == -1.0
        restored = checkpoints.restore(abstract(state)).state
    assert_same_bits(restored, jax.tree.map(jnp.asarray, expected))


@pytest.mark.parametrize("pieces", [False, True])
def test_restores_onto_another_mesh(tmp_path, monkeypatch, pieces):
    if pieces:  # of two chunks each, but for the last
        monkeypatch.setattr(checkpoint_reading, "LARGE_BYTES", 0)
        monkeypatch.setattr(large_arrays, "_PIECE_BYTES", 2 * 8 * 8 * 4)
    devices = np.asarray(jax.devices())
    rows = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "a"), jax.P("a"))
    grid = jax.sharding.NamedSharding(jax.sharding.Mesh(devices.reshape(2, 4), ("a", "b")), jax.P("b", "a"))
    everywhere = jax.sharding.NamedSharding(grid.mesh, jax.P())
    table = jnp.arange(64 * 8, dtype=jnp.float32).reshape(64, 8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"table": jax.device_put(table, rows)}, None, CONFIG, CORPUS)
        for sharding in (grid, everywhere, rows):
            leaf = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=sharding)
            restored = checkpoints.restore({"table": leaf}).state["table"]
            assert restored.sharding == sharding
            assert_same_bits(restored, table)
        alone = checkpoints.restore({"table": jax.ShapeDtypeStruct(table.shape, table.dtype)}).state["table"]
        assert alone.devices() == {jax.devices()[0]}


@pytest.mark.parametrize("pieces", [False, True])
def test_what_was_split_over_eight_devices_is_read_onto_any(tmp_path, monkeypatch, pieces):
    if pieces:
        monkeypatch.setattr(checkpoint_reading, "LARGE_BYTES", 4)
        monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 8 * 2)  # of three rows at most
        monkeypatch.setattr(large_arrays, "_PIECE_BYTES", 2 * 3 * 8 * 2)
    devices = np.asarray(jax.devices())

    def on(devices, *spec, kind=None):
        mesh = jax.sharding.Mesh(devices, tuple("ab"[: devices.ndim]))
        return jax.sharding.NamedSharding(mesh, jax.P(*spec), memory_kind=kind)

    values = {
        "table": jnp.arange(24 * 8, dtype=jnp.bfloat16).reshape(24, 8),
        "scale": jnp.arange(24.0).reshape(24, 1),
        "cube": jnp.arange(24 * 4 * 2).reshape(24, 4, 2),
        "seen": jnp.arange(24) % 3 == 0,
    }
    rows = on(devices, "a")
    saved = {name: jax.device_put(value, rows) for name, value in values.items()}
    four, grid = devices[:4], devices.reshape(2, 4)
    both = on(grid, "a", "b")
    onto = {
        "one device": (on(devices[:1]),) * 4,
        "columns on four": (on(four, None, "a"), on(four), on(four, None, "a"), on(four)),
        "rows on four": (on(devices[4:], "a"),) * 4,
        "both": (both, on(grid, "b"), both, rows),
        "replicas": (on(grid, "b"), on(grid), on(grid, None, None, "a"), rows),
        "on the host": (on(devices[:1], kind="pinned_host"),) * 4,
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, None, CONFIG, CORPUS)
        for case, shardings in onto.items():
            wanted = {
                name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
                for (name, value), sharding in zip(values.items(), shardings, strict=True)
            }
            restored = checkpoints.restore(wanted).state
            assert {name: a.sharding for name, a in restored.items()} == {
                name: leaf.sharding for name, leaf in wanted.items()
            }, case
            assert_same_bits(restored, values)


def test_a_device_reads_what_it_needs_and_rows_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_reading, "LARGE_BYTES", 0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 8 * 4)
    table = jnp.arange(64 * 8, dtype=jnp.float32).reshape(64, 8)
    read = []
    original = checkpoint_reading.put_back

    def note(piece, place, **how):
        read.append((place, piece.size))
        original(piece, place, **how)

    monkeypatch.setattr(checkpoint_reading, "put_back", note)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    leaf = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=jax.NamedSharding(mesh, jax.P("a", "b")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"table": table}, None, CONFIG, CORPUS)
        checkpoints.restore({"table": leaf})
    assert sum(size for _, size in read) == table.size
    assert {(place[0].start, place[0].stop) for place, _ in read} == {(i, i + 16) for i in range(0, 64, 16)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int32, jnp.bool])
@pytest.mark.parametrize("shape", [(70, 3), (5,), (7, 2, 3)])
def test_large_arrays_are_read_in_pieces(tmp_path, monkeypatch, dtype, shape):
    monkeypatch.setattr(checkpoint_reading, "LARGE_BYTES", 0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 8)
    monkeypatch.setattr(large_arrays, "_PIECE_BYTES", 24)
    state = {"nested": ({"table": jax.random.normal(jax.random.key(0), shape).astype(dtype)},)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, None, CONFIG, CORPUS)
        assert_same_bits(checkpoints.restore(abstract(state)).state, state)


def test_position_of_the_data_iterator(tmp_path):
    def iterator():
        return iter(grain.MapDataset.range(1000).shuffle(seed=3).repeat().batch(4).to_iter_dataset())

    data = iterator()
    for _ in range(5):
        next(data)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(), data, CONFIG, CORPUS)
        following = [next(data) for _ in range(3)]  # the save is in flight
        fresh = iterator()
        checkpoints.restore(abstract(make_state()), fresh)
    chex.assert_trees_all_equal([next(fresh) for _ in range(3)], following)


def test_subtree_reads_its_entries_alone(saved, monkeypatch):
    state = make_state(20)
    wanted = {"params": state.params, "buffers": state.buffers}
    bytes_read = []
    original = module.ocp.checkpoint_utils.construct_restore_args

    def record(target):
        bytes_read.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(target)))
        return original(target)

    monkeypatch.setattr(module.ocp.checkpoint_utils, "construct_restore_args", record)
    with Checkpoints(saved, read_only=True) as checkpoints:
        restored = checkpoints.restore_subtree(abstract(wanted))
    assert_same_bits(restored.state, wanted)
    assert (restored.step, bytes_read) == (20, [4 * 8 * 2 + 8 * 4 + 64 * 4 + 64])


# ---- what is kept


def test_keeps_the_newest_and_the_best(tmp_path):
    save_all(tmp_path, [3.0, 1.0, None, 2.0, 5.0, float("nan"), 4.0], keep_last=2, keep_best=2)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [20, 40, 60, 70]
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (70, 20)


def test_checkpoints_without_a_loss_are_kept_by_recency_alone(tmp_path):
    save_all(tmp_path, [None, None, None], keep_last=1, keep_best=3)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([30], None)


def test_the_best_is_remembered_by_the_next_process(tmp_path):
    save_all(tmp_path, [1.0, 2.0], keep_last=1, keep_best=1)
    with Checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        checkpoints.restore(abstract(make_state()))
        checkpoints.save(30, make_state(), None, CONFIG, CORPUS)
        checkpoints.mark(30, 3.0)
        checkpoints.wait()
        assert checkpoints.all_steps() == [10, 30]


# ---- damage


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def files_of(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_damage_to_any_file_is_found(copy, harm):
    names = set()
    for path in files_of(copy / "20"):
        if path.parent.name == "20" and path.name != "manifest.json":
            continue  # Orbax's own, see the next test but one
        names.add(path.name if path.parent.name != "d" else "chunks")
        content = path.read_bytes()
        harm(path)
        damage = find_damage(copy / "20")
        if (path.name, harm) != ("manifest.json", flip):  # a flipped letter in it may be a blank
            assert path.name in damage, path
        path.write_bytes(content)
        assert find_damage(copy / "20") is None
    assert {"_METADATA", "manifest.ocdbt", "chunks", "metadata", "manifest.json"} <= names


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("state/_METADATA", "bytes instead of"),
        ("state/_sharding", "bytes instead of"),
        ("state/manifest.ocdbt", "bytes instead of"),
        ("state/ocdbt.process_0/manifest.ocdbt", "bytes instead of"),
        ("state/ocdbt.process_0/d/*", "bytes instead of"),
        ("state/d/*", "bytes instead of"),
        ("meta/metadata", "bytes instead of"),
        ("manifest.json", "cannot be read"),
    ],
)
def test_a_truncated_file_falls_back_and_says_so(copy, warnings, pattern, reason):
    truncate(next((copy / "20").glob(pattern)))
    with Checkpoints(copy) as checkpoints:  # open for writing: a run must be able to start, too
        restored = checkpoints.restore(abstract(make_state()), expect_config=CONFIG)
    assert_same_bits(restored.state, make_state(10))
    ((step, why),) = restored.skipped
    assert (restored.step, step) == (10, 20)
    assert reason in why
    (line,) = [line for line in warnings if line.startswith("skipping damaged checkpoint")]
    assert line.endswith(f"/20: {why}")


@pytest.mark.parametrize("harm", [truncate, Path.unlink])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
def test_orbax_own_marks_are_not_needed(copy, name, harm):
    harm(copy / "20" / name)
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.restore(abstract(make_state())).step == 20
        checkpoints.save(30, make_state(30), None, CONFIG, CORPUS)
        checkpoints.wait()
        assert checkpoints.all_steps() == [20, 30]


def test_of_a_large_file_blocks_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_CHECKSUM_WHOLE_BYTES", 2**20)
    monkeypatch.setattr(manifest, "_CHECKSUM_BLOCKS", 3)
    path = tmp_path / "large"
    content = np.random.default_rng(0).bytes(2**20 + 2)
    path.write_bytes(content)
    manifest.write_manifest(tmp_path)
    middle = (2**20 + 2 - 2**16) // 2
    checked = [0, 2**16 - 1, middle, middle + 2**16 - 1, 2**20 + 1 - 2**16 + 1, 2**20 + 1]
    for place in checked:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert find_damage(tmp_path) == "large has other content than was written"
    path.write_bytes(content[:-1])
    assert find_damage(tmp_path) == f"large has {2**20 + 1} bytes instead of {2**20 + 2}"


def test_damage_that_the_manifest_hides_falls_back_when_orbax_raises(tmp_path):
    # One array alone: of several, Orbax leaves the others' reads to fail loudly in a closed event loop.
    state = {"table": jnp.arange(5.0)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, None, CONFIG, CORPUS)
    flip(tmp_path / "2" / "state" / "manifest.ocdbt")
    manifest.write_manifest(tmp_path / "2")
    assert find_damage(tmp_path / "2") is None
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract(state))
    ((step, reason),) = restored.skipped
    assert step == 2
    assert len(reason) <= 200
    assert_same_bits(restored.state, state)


def test_running_out_of_memory_is_no_damage(saved, monkeypatch):
    def exhaust(*_, **__):
        raise MemoryError

    monkeypatch.setattr(module, "read_state", exhaust)
    with Checkpoints(saved, read_only=True) as checkpoints, pytest.raises(MemoryError):
        checkpoints.restore(abstract(make_state()))


def test_none_is_whole(copy):
    for step in (10, 20):
        (copy / str(step) / "meta" / "metadata").unlink()
    with Checkpoints(copy, read_only=True) as checkpoints:
        gone = "meta/metadata is missing"
        with pytest.raises(UserError, match=f"^no whole checkpoint in .*: step 20: {gone}; step 10: {gone}$"):
            checkpoints.restore(abstract(make_state()))
        with pytest.raises(UserError, match=f"^no whole checkpoint in .*: step 20: {gone}$"):
            checkpoints.read_meta(20)


def test_a_run_that_fell_back_replaces_the_damaged_checkpoint(copy, warnings):
    truncate(copy / "20" / "manifest.json")
    with Checkpoints(copy, keep_last=2) as checkpoints:
        checkpoints.restore(abstract(make_state()))
        checkpoints.save(15, make_state(15), None, CONFIG, CORPUS)
        checkpoints.wait()
        assert checkpoints.all_steps() == [10, 15]
        assert any("deleting checkpoint of step 20" in line for line in warnings)
        assert_same_bits(checkpoints.restore(abstract(make_state())).state, make_state(15))


def test_a_run_that_was_not_restored_overwrites_nothing(copy):
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(
            UserError, match=r"cannot save step 10: .* already holds checkpoints of step 10, 20"
        ):
            checkpoints.save(10, make_state(), None, CONFIG, CORPUS)
        assert checkpoints.all_steps() == [10, 20]


# ---- kills

KILLED = """
    import os, pathlib, signal, sys, time
    import jax
    jax.config.update("jax_platforms", "cpu")
    import jax.numpy as jnp
    from ultramem_jax.training import checkpoints as module

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    moment = sys.argv[2]
    checkpoints = module.Checkpoints(sys.argv[1], keep_last=1, keep_best=0)
    state = {"table": jnp.arange(2**22, dtype=jnp.float32)}
    checkpoints.save(1, state, None, {}, {})
    checkpoints.wait()
    if moment == "before the manifest":
        module.write_manifest = die
    if moment == "while the old one is deleted":
        unlink, calls = os.unlink, []
        def unlink_some(*where, **options):
            calls.append(where)
            die() if len(calls) == 8 else unlink(*where, **options)
        os.unlink = unlink_some
    checkpoints.save(2, state, None, {}, {})
    if moment == "while the arrays are written":
        # The save runs in the background, and on a busy machine has not begun when it returns.
        while not list(pathlib.Path(sys.argv[1]).glob("2*")):
            time.sleep(0.001)
        die()
    checkpoints.wait()
"""


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("while the arrays are written", 1),
        ("before the manifest", 1),
        ("while the old one is deleted", 2),
    ],
)
def test_killed_while_saving(tmp_path, moment, step):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), moment]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    remains = {path.name for path in tmp_path.iterdir()}
    assert len(remains) == 2, remains
    assert (find_damage(tmp_path / "1") is None) == (step == 1)
    expected = {"table": jnp.arange(2**22, dtype=jnp.float32)}
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        restored = checkpoints.restore(abstract(expected))
        assert (restored.step, restored.skipped) == (step, ())
        assert_same_bits(restored.state, expected)
        checkpoints.save(3, expected, None, {}, {})
        checkpoints.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"3"}


# ---- what does not fit


def test_another_model_is_refused_before_arrays_are_read(saved, monkeypatch):
    monkeypatch.setattr(module, "read_state", lambda *_, **__: pytest.fail("read"))
    here = to_dict(
        RunConfig(model=ModelConfig(embed_dim=256, memories={"memory": families.ultramem(placement="1:2")}))
    )
    here["data"]["tokenizer"] = "bpe"
    expected = (
        f"checkpoint at {saved / '20'} is of another model: model.embed_dim is 128 there and 256 here; "
        "model.memories.memory is None there and given here; data.tokenizer is 'bytes' there and 'bpe' here"
    )
    with Checkpoints(saved, read_only=True) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(abstract(make_state()), expect_config=here)
    assert str(error.value) == expected


def test_settings_of_training_may_differ(saved):
    here = to_dict(RunConfig())
    here["train"]["steps"] = 7
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), expect_config=here).step == 20


def test_another_state_is_refused_by_entry(saved):
    state = abstract(make_state(width=16))
    state = state.replace(
        tables={"memory_1": state.tables["memory_0"]}, rng=jax.ShapeDtypeStruct((2,), jnp.int32)
    )
    with Checkpoints(saved, read_only=True) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.restore(state)
        with pytest.raises(UserError, match=r"params.bias is float32.8. there and float32.16. here$"):
            checkpoints.restore_subtree(
                {"params": {**abstract(make_state()).params, "bias": state.params["bias"]}}
            )
    message = str(error.value)
    assert message.startswith(f"checkpoint at {saved / '20'} holds another state: ")
    assert "params.bias is float32[8] there and float32[16] here" in message
    assert message.endswith(
        "; tables.memory_1 is absent there and float32[64,16] here; rng is uint32[2] there "
        "and int32[2] here; and 1 more"
    )
    assert "\n" not in message


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match=f"no checkpoints: there is no directory {tmp_path / 'none'}"):
        Checkpoints(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert (checkpoints.all_steps(), checkpoints.latest_step(), checkpoints.best_step()) == (
            [],
            None,
            None,
        )
        with pytest.raises(UserError, match=f"no checkpoints in {tmp_path / 'new'}"):
            checkpoints.read_meta()
