"""Which rows of a batch a process needs, and the batch put together from them."""

import chex
import jax
import numpy as np
import pytest

from ultramem_jax.config import MeshConfig
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.mesh import make_mesh, rows_here, shard_batch


@pytest.mark.parametrize(
    "mesh, tokens",
    [(MeshConfig(), ("data",)), (MeshConfig(data=2, fsdp=2, tensor=2), ("data", "fsdp")), (MeshConfig(), ())],
)
def test_a_batch_lies_where_its_sequences_are_worked_on(mesh, tokens):
    axes = MeshAxes(make_mesh(mesh), tokens)
    batch = np.arange(16 * 3).reshape(16, 3)
    chex.assert_trees_all_equal(rows_here(axes, 16), np.arange(16))
    sharded = shard_batch(batch, axes)
    assert sharded.sharding.spec == jax.P(tokens)
    chex.assert_trees_all_equal(sharded, batch)


class OfAProcess:
    """The devices of `MeshAxes` that one of several processes has."""

    def __init__(self, axes, devices):
        self.tokens, self._axes, self._devices = axes.tokens, axes, devices

    def sharding(self, spec):
        whole, devices = self._axes.sharding(spec), self._devices

        class Sharding:
            def addressable_devices_indices_map(self, shape):
                return {d: index for d, index in whole.devices_indices_map(shape).items() if d in devices}

        return Sharding()


@pytest.mark.parametrize(
    "mesh, devices, rows",
    [
        (MeshConfig(), slice(0, 4), range(0, 8)),
        (MeshConfig(), slice(4, 8), range(8, 16)),
        (MeshConfig(data=2, tensor=4), slice(0, 2), range(0, 8)),  # as much as the next two devices
        (MeshConfig(data=2, tensor=4), slice(2, 4), range(0, 8)),
        (MeshConfig(data=4, tensor=2), slice(0, 8, 2), range(0, 16)),
    ],
)
def test_a_process_needs_the_rows_of_its_devices(mesh, devices, rows):
    axes = MeshAxes(make_mesh(mesh), ("data",))
    here = OfAProcess(axes, jax.devices()[devices])
    chex.assert_trees_all_equal(rows_here(here, 16), rows)
