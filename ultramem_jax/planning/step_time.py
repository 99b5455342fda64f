"""Estimates the time of a step on given hardware from FLOPs, bytes and published rates; measures nothing.

A step uses four resources: matrix units, memory, the links within a node and the links between nodes. If
everything overlapped, a step would take as long as the busiest resource. If nothing overlapped, it would take
as long as all parts one after the other.

The estimate leaves out activations on their way to memory and back, gradients of rows, the sort of the reads,
top-k, Muon's matrix products, and everything else that is neither a matrix product of the model nor a
parameter nor a row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ultramem_jax.accounting import expected_rows, flops_per_token
from ultramem_jax.accounting.model import DTYPE_BYTES, FLOAT32_BYTES
from ultramem_jax.accounting.step_costs import UPDATE_ARRAYS
from ultramem_jax.config import RunConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.planning.compiled_step import DeviceBytes
from ultramem_jax.planning.hardware import Hardware

_PASSES = 3
"""Passes of a step over the weights: forward, backward by input, and backward by weight."""
_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon", "lion": "Lion"}
_DENSE_READS = 2
"""Reads of every dense parameter in a step: by the forward and by the backward pass."""


@dataclass(frozen=True)
class TimePart:
    """Holds one part of a step on one device."""

    name: str
    resource: str
    """Resource that the part uses: `compute`, `memory`, `links within a node` or `links between nodes`."""
    amount: float
    """FLOPs of `compute`, else bytes."""
    seconds: float


@dataclass(frozen=True)
class TimeEstimate:
    """Holds the parts of a step, and gives bounds of its time."""

    parts: tuple[TimePart, ...]
    tokens: int
    """Tokens of a step, over all devices."""

    @property
    def by_resource(self) -> dict[str, float]:
        """Returns the seconds that each resource is busy."""
        busy: dict[str, float] = {}
        for part in self.parts:
            busy[part.resource] = busy.get(part.resource, 0) + part.seconds
        return busy

    @property
    def overlapped(self) -> float:
        """Returns the seconds of a step if all resources work at the same time."""
        return max(self.by_resource.values())

    @property
    def sequential(self) -> float:
        """Returns the seconds of a step if no two parts run at the same time."""
        return math.fsum(part.seconds for part in self.parts)


def estimate_step(
    config: RunConfig,
    axes: MeshAxes,
    hardware: Hardware,
    state: DeviceBytes,
    gathered_parameters: int,
    sent: Mapping[tuple[str, ...], float],
) -> TimeEstimate:
    """Estimates the parts of a training step on one device.

    Args:
        config: config of the run.
        axes: axes of its mesh; the mesh may have no devices.
        hardware: the device, of which all are alike.
        state: bytes of its parameters and of their optimizer state; the bytes of its tables are not used.
        gathered_parameters: bytes of the parameters that a device computes with.
        sent: bytes that a device sends along each group of axes.
    """
    flops = step_flops(config, axes)
    dense = _DENSE_READS * gathered_parameters + UPDATE_ARRAYS * state.parameters + 2 * state.optimizer
    looked_up, updated = row_traffic(config, axes, hardware.access_bytes)
    rate = hardware.memory_bytes_per_second
    parts = [
        TimePart("compute", "compute", flops, flops / hardware.matmul_flops(config.model.dtype)),
        TimePart(f"parameters and {_OPTIMIZERS[config.train.optimizer]}", "memory", dense, dense / rate),
    ]
    if config.model.sites:
        # The forward pass reads rows once, the backward pass once more for the gradients of the scores.
        parts.append(TimePart("rows, forward and backward", "memory", 2 * looked_up, 2 * looked_up / rate))
        parts.append(TimePart("update of rows", "memory", updated, updated / rate))
    sizes = dict(axes.mesh.shape)
    for along, moved in sent.items():
        inside = within_node(sizes, along, hardware.devices_per_node)
        speed = hardware.node_link_bytes if inside else hardware.outer_link_bytes
        where = "within a node" if inside else "between nodes"
        name = f"sent along {' × '.join(along) or 'unknown axes'}"
        parts.append(TimePart(name, f"links {where}", moved, moved / speed))
    return TimeEstimate(tuple(parts), config.train.batch_size * config.data.seq_len)


def step_flops(config: RunConfig, axes: MeshAxes) -> float:
    """Returns the FLOPs of one device in a step: three times those of a forward pass.

    Devices along `tensor` share attention, feed-forward and, if it divides, the vocabulary. Each of them
    repeats the work of a memory before its lookup. The owners of rows pool them.
    """
    model, tensor = config.model, axes.mesh.shape["tensor"]
    flops = flops_per_token(model, config.data.seq_len)
    shared = flops.attention + flops.attention_scores
    logits = flops.logits / (tensor if model.vocab_size % tensor == 0 else 1)
    memory = flops.memory.total() + flops.memory_scoring
    apart = axes.of_tokens(axes.experts) == axes.experts
    feed_forward = flops.feed_forward / (1 if apart else axes.size(axes.experts))
    of_token = (shared + feed_forward) / tensor + logits + flops.router + memory
    tokens = config.train.batch_size * config.data.seq_len
    lookups = tokens / axes.size(axes.replicas) / axes.size(axes.owners) * flops.memory_lookup
    return _PASSES * (tokens / axes.size(axes.tokens) * of_token + lookups)


def row_traffic(config: RunConfig, axes: MeshAxes, access: int) -> tuple[float, float]:
    """Returns the bytes of rows that one device's memory moves in a step: by one lookup, and by the update.

    A lookup accesses the row of each read separately. The update visits rows in the order of their slots, so
    rows in one access share it, but not where it changes only `train.slots_per_step` of them. Reads are
    assumed to be uniform.

    Args:
        config: config of the run.
        axes: axes of its mesh.
        access: bytes of the smallest access.
    """
    train, columns, owners = config.train, axes.size(axes.width), axes.size(axes.slots)
    looked_up = updated = 0.0
    for readers in table_readers(config.model).values():
        table = readers[0].config.table
        reads = train.batch_size * config.data.seq_len * readers[0].config.reads_per_token * len(readers)
        rows, reads_here = readers[0].num_slots / owners, reads / owners
        widths = [width // columns for width in table.arrays.values()]
        value = DTYPE_BYTES[table.dtype]
        of_read = sum(access_bytes(value * width, access) for width in widths)
        looked_up += reads_here / axes.size(axes.replicas) * of_read
        if train.table_gradient == "dense":
            of_row = sum(UPDATE_ARRAYS * FLOAT32_BYTES * width for width in widths)
            of_row += 2 * sum(array.bytes(width) for array in train.row_arrays for width in widths)
            updated += rows * of_row
            continue
        for width in widths:
            for of_row in (value * width, *(array.bytes(width) for array in train.row_arrays)):
                touched = touched_bytes(of_row, rows, reads_here, access)
                if train.slots_per_step:
                    touched = min(touched, train.slots_per_step / owners * access_bytes(of_row, access))
                updated += 2 * touched  # read and written
        if train.background:
            updated += touched_bytes(FLOAT32_BYTES, rows, reads_here, access)  # weights of the scores
    return looked_up, updated


def access_bytes(row_bytes: int, access: int) -> int:
    """Returns the bytes that reading one row costs: a whole number of accesses."""
    return -(-row_bytes // access) * access


def touched_bytes(row_bytes: int, rows: float, reads: float, access: int) -> float:
    """Returns the bytes of the accesses that uniform reads touch, each counted once.

    Args:
        row_bytes: bytes of a row; several rows may lie in one access.
        rows: number of rows.
        reads: number of reads, which go through the rows in their order.
        access: bytes of the smallest access.
    """
    together = max(access // row_bytes, 1)
    accesses = max(math.ceil(rows / together), 1)
    return expected_rows(accesses, round(reads)) * access_bytes(row_bytes, access)


def within_node(sizes: Mapping[str, int], axes: tuple[str, ...], devices_per_node: int) -> bool:
    """Tells whether all groups along some axes lie within nodes, if devices are numbered in the mesh's order.

    Args:
        sizes: sizes of all axes, major to minor.
        axes: axes of the groups; without axes, a group may be anywhere.
        devices_per_node: consecutive devices in a node.
    """
    names = list(sizes)
    if not axes:
        return math.prod(sizes.values()) <= devices_per_node
    nodes = np.arange(math.prod(sizes.values())).reshape([sizes[name] for name in names]) // devices_per_node
    along = tuple(names.index(name) for name in axes)
    return bool((np.ptp(nodes, axis=along) == 0).all())
