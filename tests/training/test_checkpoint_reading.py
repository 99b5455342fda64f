"""Arrays are restored onto any devices, in pieces where they are large, and only those that are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.assertions import assert_same_bits
from tests.support.checkpoint_states import CONFIG, CORPUS, abstract, make_state
from ultramem_jax.training import checkpoint_reading, large_arrays
from ultramem_jax.training import checkpoints as module
from ultramem_jax.training.checkpoints import Checkpoints


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


def test_subtree_reads_only_its_entries(saved, monkeypatch):
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
