"""Lowers the programs of a run for devices that need not be there: a training step, or a decoding step.

All arrays are abstract, so no table is ever allocated.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import MeshConfig, ModelConfig, RunConfig
from ultramem_jax.errors import UserError
from ultramem_jax.models import Transformer
from ultramem_jax.models.cache import empty_cache
from ultramem_jax.models.generation import decoding_step
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.ops.exchanges import compiled_with_names
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.mesh import AXES, make_mesh, mesh_axes, one_device
from ultramem_jax.parallel.table_layouts import by_rows, placements
from ultramem_jax.planning.targets import Target
from ultramem_jax.platforms import targeting
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.state import abstract_state
from ultramem_jax.training.step import make_train_step
from ultramem_jax.tree_types import ArrayTree


@dataclass(frozen=True)
class Program:
    """Holds a program that is lowered, and not yet compiled."""

    lowered: Any
    """The program, of JAX's class `Lowered`."""
    arguments: tuple[ArrayTree, ...]
    """Shapes, dtypes and shardings of its arguments."""
    axes: MeshAxes

    def compile(self, name: str) -> Any:
        """Compiles the program, with names of mesh axes in its text, and returns JAX's `Compiled`.

        Args:
            name: what the program is, for the message.

        Raises:
            UserError: the compiler refuses it, for example because it does not fit into the device's memory.
        """
        try:
            with compiled_with_names():
                return self.lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{name}: the compiler refuses it: {reason}") from error


def training_program(config: RunConfig, devices: Sequence[jax.Device], target: Target | None) -> Program:
    """Lowers the training step of a run; its arguments are the state, donated, and tokens (B, S + 1).

    Args:
        config: the run; `resolved`.
        devices: as many as the mesh has.
        target: what the devices are; None for those of this process.

    Raises:
        UserError: a batch that does not divide over the mesh.
    """
    with targeting(target.platform if target else None):
        axes = mesh_axes(config, make_mesh(config.mesh, devices))
        optimizers = make_optimizers(config)
        state, tokens = abstract_state(config, optimizers, axes), _abstract_batch(config, axes)
        step = jax.jit(
            make_train_step(config, optimizers, axes=axes),
            donate_argnums=0,
            out_shardings=(placements(state), axes.sharding()),
        )
        return Program(step.lower(state, tokens), (state, tokens), axes)


def decoding_program(
    config: ModelConfig, batch_size: int, cache_length: int, device: jax.Device, target: Target | None
) -> Program:
    """Lowers the step that takes a token of every sequence through a model and samples the next one.

    Its arguments are the served variables, the cache, donated, and small arrays. The cache is in the model's
    dtype.

    Args:
        config: the model.
        batch_size: B, sequences.
        cache_length: U, cache positions.
        device: the device that decodes.
        target: what the device is; None for one of this process.

    Raises:
        UserError: an empty batch or cache.
    """
    transformer = Transformer(config)

    def variables() -> dict[str, ArrayTree]:
        made = transformer.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        parts = ("params", "memory", "buffers")
        return prepare_for_decoding(config, {name: made[name] for name in parts if name in made})

    with targeting(target.platform if target else None):
        axes = one_device(device)

        def placed(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=axes.sharding())

        def table(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            how = by_rows(shape.shape, axes.sharding())
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=how)

        held = jax.eval_shape(variables)
        cache = jax.eval_shape(lambda: empty_cache(config, batch_size, cache_length, config.dtype))
        tokens = jax.ShapeDtypeStruct((batch_size,), np.int32)
        number = jax.ShapeDtypeStruct((), np.uint32)
        held = jax.tree.map(placed, held)
        if "memory" in held:
            held["memory"] = jax.tree.map(table, held["memory"])
        arguments = held, *jax.tree.map(placed, (cache, tokens, tokens, number, number))
        step = jax.jit(decoding_step(config, Sampling()), donate_argnums=1)
        return Program(step.lower(*arguments), arguments, axes)


def devices_for(config: RunConfig, target: Target | None) -> Sequence[jax.Device]:
    """Returns devices for a run's mesh: those of a target, or simulated ones of the CPU.

    Raises:
        UserError: the target has fewer, or JAX has been started with fewer.
    """
    number = math.prod(mesh_sizes(config.mesh).values())
    return target.devices(number) if target else simulated_devices(number)


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


def _abstract_batch(config: RunConfig, axes: MeshAxes) -> jax.ShapeDtypeStruct:
    shape = (config.train.batch_size, config.data.seq_len + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=axes.sharding(P(axes.tokens)))
