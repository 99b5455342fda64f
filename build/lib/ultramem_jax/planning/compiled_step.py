"""Compiles a training step without its devices, and counts the bytes that the step holds.

The devices are simulated devices of the CPU, and all arrays are abstract, so no table is ever allocated. The
bytes of the state follow exactly from shapes and shardings. The compiler's own figures are those of its CPU
backend.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

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
from ultramem_jax.tree_types import ArrayTree

_FSDP = "fsdp"


@dataclass(frozen=True)
class DeviceBytes:
    """Holds the bytes of one device during a step."""

    parameters: int
    """Dense parameters and experts, float32, in bytes."""
    optimizer: int
    """Optimizer state of `parameters`, in bytes."""
    tables: int
    row_moments: int
    slots_seen: int
    """Record of the slots seen, one byte per slot."""
    other_state: int
    """Buffers, the number of the step and the seed, in bytes."""
    batch: int
    temporaries: int
    """Activations, gradients and all else that the compiled program holds beside its arguments."""
    on_host: int = 0
    """Tables and row moments in host memory, in bytes; not part of `total`."""

    @property
    def arguments(self) -> int:
        """Returns the bytes that exist before the step: the state, updated in place, and the batch."""
        return self.total - self.temporaries

    @property
    def total(self) -> int:
        """Returns the bytes of everything on the device."""
        return sum(dataclasses.astuple(self)) - self.on_host


@dataclass(frozen=True)
class CompiledStep:
    """Holds what is known about a compiled step."""

    config: RunConfig
    axes: MeshAxes
    bytes: DeviceBytes
    gathered_parameters: int
    """Bytes of the parameters that a device computes with, after gathering them along `fsdp`."""
    argument_bytes: int
    """Bytes of the program's arguments, as the compiler counts them."""
    collectives: tuple[Collective, ...]


def resolved(config: RunConfig) -> RunConfig:
    """Returns the config with a mesh of known size.

    `data = 0` stands for all devices that the other axes leave; without devices it becomes 1.
    """
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=max(config.mesh.data, 1)))


def mesh_sizes(mesh: MeshConfig) -> dict[str, int]:
    """Returns the number of devices along each axis, major to minor."""
    return {name: getattr(mesh, name) for name in AXES}


def abstract_axes(config: RunConfig) -> MeshAxes:
    """Returns the axes of a run on a mesh without devices, which suffice for everything but compiling.

    Raises:
        UserError: a batch that does not divide over the mesh.
    """
    sizes = mesh_sizes(resolved(config).mesh)
    return mesh_axes(config, AbstractMesh(tuple(sizes.values()), tuple(sizes)))  # type: ignore[arg-type]


def simulated_devices(number: int) -> Sequence[jax.Device]:
    """Returns `number` simulated devices of the CPU; the first ones if this process has more.

    Raises:
        UserError: JAX has already been used in this process, with fewer devices or devices of another kind.
    """
    try:
        jax.config.update("jax_num_cpu_devices", max(number, jax.config.values["jax_num_cpu_devices"]))
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        pass  # JAX has its devices already; the check below tells whether they are enough
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
        config: the run; `resolved`.

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
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler gives no figures of memory"
    return CompiledStep(
        config,
        axes,
        dataclasses.replace(state_bytes(state, tokens), temporaries=int(memory.temp_size_in_bytes)),
        gathered_bytes(state.params),
        int(memory.argument_size_in_bytes),
        tuple(collectives_of(compiled.as_text() or "", axes.mesh)),
    )


def state_bytes(state: TrainState, tokens: jax.ShapeDtypeStruct) -> DeviceBytes:
    """Counts the bytes that the arguments of a step occupy on one device, without temporaries.

    Args:
        state: the state from `abstract_state`.
        tokens: the batch, with its sharding.
    """
    tables = (state.tables, state.table_state)
    on_host = {id(leaf) for leaf in jax.tree.leaves(tables) if leaf.sharding.memory_kind == "pinned_host"}

    def of(tree: ArrayTree, host: bool = False) -> int:
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


def gathered_bytes(params: ArrayTree) -> int:
    """Returns the bytes of one device's parameters after gathering those that `fsdp` splits."""
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
