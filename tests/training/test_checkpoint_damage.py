"""Damage is found, a restore falls back to the checkpoint before, and a kill leaves a whole one."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.assertions import assert_same_bits
from tests.support.checkpoint_states import CONFIG, CORPUS, abstract, flip, make_state, truncate
from ultramem_jax.errors import UserError
from ultramem_jax.training import checkpoints as module
from ultramem_jax.training import manifest
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.manifest import find_damage


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
    # Only one array: of several, Orbax leaves the others' reads to fail loudly in a closed event loop.
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
