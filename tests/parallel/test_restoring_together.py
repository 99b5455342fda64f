"""A state that eight devices of one process saved, read and saved again by two processes of two devices."""

import os
import socket
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tests.support.checkpoint_states import abstract
from tests.support.paths import ROOT
from ultramem_jax.training.checkpoints import Checkpoints

MEMBER = """
    import json, logging, sys
    import jax, numpy as np
    from ultramem_jax.parallel import distributed
    from ultramem_jax.training import checkpoint_reading, checkpoints, large_arrays

    folder, address, index, large = sys.argv[1:]
    distributed.join(distributed.Membership(address, 2, int(index)))
    if large == "large":
        checkpoint_reading.LARGE_BYTES, checkpoints.CHUNK_BYTES, large_arrays._PIECE_BYTES = 4, 96, 200
    read = []
    put_back = checkpoint_reading.put_back
    checkpoint_reading.put_back = lambda piece, *a, **k: (read.append(piece.size), put_back(piece, *a, **k))
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"rows": (("a", "b"),), "columns": (None, ("a", "b")), "both": ("a", "b"), "whole": ()}
    wanted = {
        name: jax.ShapeDtypeStruct((24, 8), np.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
        for name, spec in specs.items()
    }
    class Iterator:
        def set_state(self, state):
            self.state = state
        def get_state(self):
            return self.state
        def start_prefetch(self):
            pass
    data = Iterator()
    with checkpoints.Checkpoints(folder) as saved:
        assert saved.latest_step() == 3
        restored = saved.restore(wanted, data)
        assert restored.step == 2 and restored.skipped[0][1].startswith("meta/metadata has"), restored.skipped
        assert {name: a.sharding for name, a in restored.state.items()} == {
            name: leaf.sharding for name, leaf in wanted.items()
        }
        saved.save(3, jax.jit(lambda t: jax.tree.map(lambda a: a + 1, t))(restored.state), data, {}, {}, 0.5)
    of_all = distributed.gather(int(index)), any(distributed.gather(index == "1"))
    print(json.dumps([sum(read), data.state, *of_all]))
"""


class Position:
    """Stands for a data iterator whose position a checkpoint of one process holds."""

    def get_state(self):
        return {"next_index": 5}


def together(*arguments):
    """Runs `MEMBER` in two processes and returns the last line of each, as Gloo prints lines of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    folder, *rest = map(str, arguments)
    members = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(MEMBER), folder, address, str(index), *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for index in range(2)
    ]
    said = [member.communicate(timeout=300) for member in members]
    assert [member.returncode for member in members] == [0, 0], said
    return [out.splitlines()[-1] for out, _ in said]


def test_two_processes_read_their_parts_and_save_them(tmp_path):
    eight = jax.NamedSharding(jax.make_mesh((8,), "a", axis_types=(jax.sharding.AxisType.Auto,)), jax.P("a"))
    table = jnp.arange(24 * 8, dtype=jnp.float32).reshape(24, 8)
    state = {
        name: jax.device_put(table + i, eight) for i, name in enumerate(("rows", "columns", "both", "whole"))
    }
    for large in ("small", "large"):
        folder = tmp_path / large
        with Checkpoints(folder) as checkpoints:
            for step in (2, 3):
                checkpoints.save(step, state, Position(), {}, {}, 1.0)
        damaged = folder / "3" / "meta" / "metadata"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        said = together(folder, large)
        # Half of the rows, of the columns and of both, and all of the fourth; in pieces where it is large.
        read = 24 * 8 * 5 // 2 if large == "large" else 0
        assert said == [f'[{read}, {{"next_index": 5}}, [0, 1], true]'] * 2
        with Checkpoints(folder, read_only=True) as checkpoints:
            assert checkpoints.all_steps() == [2, 3] and checkpoints.best_step() == 3
            restored = checkpoints.restore(abstract(state), step=3).state
        for name, array in restored.items():
            chex.assert_trees_all_equal(array, np.asarray(state[name]) + 1)
