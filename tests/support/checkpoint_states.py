"""Makes states with every kind of leaf, saves them, and damages what was saved."""

import os
import pathlib
import shutil

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ultramem_jax.config import RunConfig, to_dict
from ultramem_jax.training import checkpoints as module
from ultramem_jax.training.checkpoints import Checkpoints

CONFIG = to_dict(RunConfig())
CORPUS = {"name": "stdlib", "sha256": "0123abcd"}


@flax.struct.dataclass
class State:
    """Holds what a run saves."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    tables: dict
    buffers: dict
    rng: jax.Array


def make_state(seed=0, width=8, sharding=None):
    """Returns a state with leaves of five dtypes, scalars among them, and with empty nodes."""
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
    """Returns the shapes and dtypes of a state, which is what a restore is asked for."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def save_all(directory, losses, **kept):
    """Saves steps 10, 20, ... with the given validation losses, state `make_state(step)`."""
    with Checkpoints(directory, **kept) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            checkpoints.save(10 * step, make_state(10 * step), None, CONFIG, CORPUS)
            if loss is not None:
                checkpoints.mark(10 * step, loss)  # the save is in flight


def truncate(path):
    """Takes the last byte from a file."""
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    """Flips a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a directory with checkpoints of steps 10 and 20. Copy it before damaging it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_all(directory, [2.0, 1.0], keep_last=2, keep_best=0)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    """Returns a copy of `saved` that a test may damage."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.fixture
def warnings(monkeypatch):
    """Returns the warnings of checkpoints, as they come."""
    lines = []
    monkeypatch.setattr(module.log, "warning", lambda text, *values: lines.append(text % values))
    return lines
