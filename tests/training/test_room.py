"""A state that cannot fit is refused before anything is drawn, with its size."""

import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from ultramem_jax import UserError
from ultramem_jax.reporting import environment
from ultramem_jax.training import room
from ultramem_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: replace(model, memories={"memory": model.memory.changed(value_dim=10**9)}),
        lambda model: replace(
            model, memories={"memory": model.memory.changed(num_keys=40_000, value_dim=64)}
        ),
        lambda model: replace(model, memories={}, mlp_dim=10**9),
        lambda model: replace(model, vocab_size=2**24, embed_dim=2**14),
    ],
)
def test_a_model_beyond_the_machine_is_refused_at_once(config, tmp_path, change):
    large = replace(config, model=change(config.model))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"not enough memory for [\d,]+ parameters, .*GB, and there are"):
        train(large, tmp_path / "run", progress=False)
    assert time.monotonic() - began < 60 and not (tmp_path / "run").exists()


def test_bytes_are_those_of_all_devices_here(monkeypatch):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def leaf(*spec):
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct((16, 8), np.float32, sharding=sharding)

    # 512 bytes in all: once if split over all devices, eight times if everywhere, twice if along `a` only.
    assert [room._bytes_here(x) for x in (leaf(("a", "b")), leaf(), leaf("a"))] == [512, 8 * 512, 2 * 512]
    monkeypatch.setattr(room, "_memory_bytes", lambda: 4 * 512)
    room.require_room({"one": leaf("a"), "other": leaf("a")}, 256)
    with pytest.raises(UserError, match="not enough memory for 256 parameters"):
        room.require_room({"one": leaf("a"), "other": leaf("a"), "more": leaf("a", "b")}, 256)


def test_host_memory_is_that_of_the_container(monkeypatch):
    monkeypatch.setattr(environment, "read_system_file", lambda path: "1000000\n")
    assert room._memory_bytes() == 1_000_000
    monkeypatch.setattr(environment, "read_system_file", lambda path: "max\n")
    assert room._memory_bytes() > 100_000_000


def test_a_device_that_runs_out_later_is_said_too(config, tmp_path, monkeypatch):
    def step(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr("ultramem_jax.training.loop._StepFunction.__call__", step)
    with pytest.raises(UserError, match=r"not enough memory .* raise train\.grad_accumulation"):
        train(config, tmp_path / "run", progress=False)
