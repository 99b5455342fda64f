"""The compiled step has the bytes of its shards, on devices that are simulated."""

import subprocess
import sys

import jax
from jax.sharding import AbstractMesh

from tests.support.paths import ROOT
from tests.support.planned import DENSE
from ultramem_jax import MeshConfig, RunConfig
from ultramem_jax.planning.programs import abstract_axes, resolved, simulated_devices


def test_bytes_per_device_are_those_of_the_shards(compiled):
    held = compiled.bytes
    assert held.parameters == 4 * DENSE
    assert held.tables == 256 * 8 * 4 // 4
    assert held.row_moments == 2 * held.tables
    assert held.slots_seen == 256 // 4 + 4  # and their number
    assert held.batch == 8 * 17 * 4 // 8
    # Two moments of every parameter, and the optimizer's counts of steps.
    assert held.optimizer - 8 * DENSE in (4, 8, 12)
    assert held.on_host == 0
    assert compiled.gathered_parameters == held.parameters


def test_the_compiler_counts_the_same_arguments(compiled):
    assert compiled.bytes.arguments == compiled.argument_bytes
    assert compiled.bytes.temporaries > 0
    assert compiled.bytes.total == compiled.bytes.arguments + compiled.bytes.temporaries


def test_a_mesh_of_unknown_size_has_one_device_along_data():
    assert resolved(RunConfig()).mesh == MeshConfig(data=1)
    assert isinstance(abstract_axes(RunConfig()).mesh, AbstractMesh)


def test_devices_are_simulated_where_jax_has_not_been_used():
    assert len(simulated_devices(2)) == 2 and len(jax.devices()) == 8
    script = (
        "from ultramem_jax.planning.programs import simulated_devices as s; "
        "print(len(s(12)), s(12)[0].platform)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["12", "cpu"], done.stderr
