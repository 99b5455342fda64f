"""A training step compiled for devices that are not there: its program, and the bytes that it holds.

The devices are simulated ones of the CPU and all arrays abstract, so no table exists at any time. The
compiler's own figures are those of its CPU backend; what state occupies follows from shapes and shardings
alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import MeshConfig, RunConfig
from ultramem_jax.errors import UserError
from ultramem_jax.ops.exchanges import compiled_with_names
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.collectives import Collective, collectives_of
from ultramem_jax.parallel.mesh import AXES, make_mesh, mesh_axes
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.state import TrainState, abstract_state
from ultramem_jax.training.step import make_train_step

_FSDP = "fsdp"


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes of one device during a step."""

    parameters: int
    """Dense ones and experts, float32."""
    optimizer: int
    """Of these."""
    tables: int
    row_moments: int
    slots_seen: int
    """A byte per slot."""
    other_state: int
    """Buffers, the number of the step, the seed."""
    batch: int
    temporaries: int
    """Activations, gradients and whatever else the compiled program holds beside its arguments."""
    on_host: int = 0
    """Tables and row moments in the memory of the host; not in `total`."""

    @property
    def arguments(self) -> int:
        """Everything that exists before the step: state, which is updated in place, and batch."""
        return self.total - self.temporaries

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self)) - self.on_host


@dataclass(frozen=True)
class CompiledStep:
    """What is known of a compiled step."""

    config: RunConfig
    axes: MeshAxes
    bytes: DeviceBytes
    gathered_parameters: int
    """Bytes of the parameters that a device computes with: `fsdp` gathers them."""
    argument_bytes: int
    """Of the program, as the compiler counts them."""
    collectives: tuple[Collective, ...]


def resolved(config: RunConfig) -> RunConfig:
    """The config with a mesh of known size: `data = 0`, the devices that are left, is 1 here."""
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=max(config.mesh.data, 1)))


def mesh_sizes(mesh: MeshConfig) -> dict[str, int]:
    """Devices along each axis, major to minor."""
    return {name: getattr(mesh, name) for name in AXES}


def abstract_axes(config: RunConfig) -> MeshAxes:
    """The axes of a run on a mesh without devices: enough for everything but compiling.

    Raises:
        UserError: a batch that does not divide over the mesh.
    """
    sizes = mesh_sizes(resolved(config).mesh)
    return mesh_axes(config, AbstractMesh(tuple(sizes.values()), tuple(sizes)))  # type: ignore[arg-type]


def simulated_devices(number: int) -> Sequence[jax.Device]:
    """So many simulated devices of the CPU; the first ones if this process has more.

    Raises:
        UserError: JAX has already been used in this process, with fewer devices or other ones.
    """
    settings: Any = jax.config
    try:
        settings.update("jax_num_cpu_devices", max(number, settings.jax_num_cpu_devices))
        settings.update("jax_platforms", "cpu")
    except RuntimeError:
        pass  # JAX has its devices already; whether they will do is asked below
    devices = jax.devices()
    if devices[0].platform != "cpu" or len(devices) < number:
        raise UserError(
            f"mesh: makes {number} devices, and JAX has been started with {len(devices)} "
            f"({devices[0].platform}); plan in a process of its own"
        )
    return devices[:number]


def compile_step(config: RunConfig) -> CompiledStep:
    """Compiles the step of a run for its mesh.

    Args:
        config: of the run; `resolved`.

    Raises:
        UserError: a batch that does not divide over the mesh, or too few devices.
    """
    devices = simulated_devices(math.prod(mesh_sizes(config.mesh).values()))
    axes = mesh_axes(config, make_mesh(config.mesh, devices))
    optimizers = make_optimizers(config)
    state, tokens = abstract_state(config, optimizers, axes), _abstract_batch(config, axes)
    shardings = jax.tree.map(lambda array: array.sharding, state)
    step = jax.jit(
        make_train_step(config, optimizers, axes=axes),
        donate_argnums=0,
        out_shardings=(shardings, axes.sharding()),
    )
    with compiled_with_names():
        compiled = step.lower(state, tokens).compile()
    memory: Any = compiled.memory_analysis()
    return CompiledStep(
        config,
        axes,
        dataclasses.replace(state_bytes(state, tokens), temporaries=int(memory.temp_size_in_bytes)),
        gathered_bytes(state.params),
        int(memory.argument_size_in_bytes),
        tuple(collectives_of(compiled.as_text() or "", axes.mesh)),
    )


def state_bytes(state: TrainState, tokens: jax.ShapeDtypeStruct) -> DeviceBytes:
    """What the arguments of a step occupy on one device; no temporaries.

    Args:
        state: of `abstract_state`.
        tokens: the batch, with its sharding.
    """
    tables = (state.tables, state.table_state)
    on_host = {id(leaf) for leaf in jax.tree.leaves(tables) if leaf.sharding.memory_kind == "pinned_host"}

    def of(tree: Any, host: bool = False) -> int:
        return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if (id(leaf) in on_host) == host)

    return DeviceBytes(
        parameters=of(state.params),
        optimizer=of(state.opt_state),
        tables=of(state.tables),
        row_moments=of(state.table_state),
        slots_seen=of(state.usage),
        other_state=of((state.step, state.buffers, state.seed)),
        batch=of(tokens),
        temporaries=0,
        on_host=of(tables, host=True),
    )


def gathered_bytes(params: Any) -> int:
    """Bytes of one device's parameters with those that `fsdp` splits whole again."""
    total = 0
    for leaf in jax.tree.leaves(params):
        split = _FSDP in jax.tree.leaves(tuple(leaf.sharding.spec))
        total += _shard_bytes(leaf) * (leaf.sharding.mesh.shape[_FSDP] if split else 1)
    return total


def _abstract_batch(config: RunConfig, axes: MeshAxes) -> jax.ShapeDtypeStruct:
    shape = (config.train.batch_size, config.data.seq_len + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=axes.sharding(P(axes.tokens)))


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
