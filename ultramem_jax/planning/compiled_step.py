"""Compiles a training step without its devices, and counts the bytes that the step holds.

All arrays are abstract, so no table is ever allocated. The bytes of the state follow exactly from shapes and
shardings. The compiler's own figures are those of a target, or of simulated devices of the CPU.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax

from ultramem_jax.config import RunConfig
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.collectives import Collective, collectives_of
from ultramem_jax.planning.programs import devices_for, training_program
from ultramem_jax.planning.targets import Target
from ultramem_jax.training.state import TrainState
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
    background: int = 0
    """Weights of the background by which rows are selected, four bytes per slot; 0 without a selection."""

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


def compile_step(config: RunConfig, target: Target | None = None) -> CompiledStep:
    """Compiles the step of a run for its mesh.

    Args:
        config: the run; `resolved`.
        target: the devices to compile for; None for simulated devices of the CPU.

    Raises:
        UserError: a batch that does not divide over the mesh, too few devices, a target without a
            compiler, or a step that the compiler refuses.
    """
    program = training_program(config, devices_for(config, target), target)
    state, tokens = program.arguments
    compiled = program.compile("the training step")
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler gives no figures of memory"
    return CompiledStep(
        config,
        program.axes,
        dataclasses.replace(state_bytes(state, tokens), temporaries=int(memory.temp_size_in_bytes)),
        gathered_bytes(state.params),
        int(memory.argument_size_in_bytes),
        tuple(collectives_of(compiled.as_text() or "", program.axes.mesh)),
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
        return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if (id(leaf) in on_host) == host)

    return DeviceBytes(
        parameters=of(state.params),
        optimizer=of(state.opt_state),
        tables=of(state.tables),
        row_moments=of(state.table_state),
        slots_seen=of(state.usage),
        background=of(state.background),
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
        total += shard_bytes(leaf) * (leaf.sharding.mesh.shape[_FSDP] if split else 1)
    return total


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of one device's part of an array."""
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
