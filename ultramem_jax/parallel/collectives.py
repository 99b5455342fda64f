"""Reads the collectives of a compiled program from its HLO text: what moves, along which axes, how often.

The text is that of `jax.jit(f).lower(...).compile().as_text()`, on CPU, GPU or TPU. It is the program of one
device, so all shapes in it are those of one device's shards.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from ultramem_jax.parallel.program_text import (
    ProgramText,
    divide_up,
    operand_bytes,
    parts,
    read_program,
    type_bytes,
    walk,
)

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
"""Kinds of collectives that are recognised."""

_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_LISTED_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d, ]*\}[, ]*)*)\}")
_IOTA_GROUPS = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_MESH_GROUPS = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{_IOTA}|([\d,]+))\))? \{{([^}}]*)\}}"
)
_REFERENCE = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{[\d, ]*\}[, ]*)*)\}")


@dataclass(frozen=True)
class Collective:
    """Describes one collective of a program, at one place where it is called.

    Bytes are those of one device and one run of the collective.
    """

    kind: str
    """Kind of the collective, one of `KINDS`."""
    axes: tuple[str, ...]
    """Mesh axes that its groups run along, in the mesh's order; () if none fit. Axes of size 1 never count.
    Those of a permutation are the axes along which a source and its target differ."""
    group_size: int
    """P, number of devices of a group; for a permutation, of devices that its pairs connect. The largest if
    groups differ."""
    operand_bytes: int
    """Bytes that a device puts in, all operands together; for a ragged all-to-all, bytes of the buffer that
    is sent from."""
    result_bytes: int
    """Bytes that a device has as the result."""
    op_name: str
    """JAX's path to the operation that it comes from; "" if the text has none."""
    loop_trip_count: int
    """Number of runs of the collective in one run of the program: the product over the loops around it. A
    loop whose count the compiler did not find counts as one pass."""
    in_loop: bool
    """Whether the collective is in a loop."""
    trips_known: bool
    """Whether the compiler found the count of every loop around it; True outside loops."""

    @property
    def moved_bytes(self) -> int:
        """Returns the bytes that a device sends in one run, with the algorithm that sends least.

        The sizes of a ragged all-to-all are data, so this is what a full and balanced one would send. A
        device that a permutation leaves out sends nothing; this is what the others send.
        """
        others = self.group_size - 1
        match self.kind:
            case "collective-permute":
                return self.operand_bytes
            case "all-gather":
                return divide_up(self.result_bytes * others, self.group_size)
            case "all-reduce":
                return divide_up(2 * self.operand_bytes * others, self.group_size)
        return divide_up(self.operand_bytes * others, self.group_size)

    @property
    def total_bytes(self) -> int:
        """Returns `moved_bytes` of all its runs in one run of the program."""
        return self.moved_bytes * self.loop_trip_count


def collectives_of(compiled_text: str, mesh: Mesh | None) -> list[Collective]:
    """Lists the collectives of a program; those of called computations are listed where they are called.

    If a computation is called from two places, its collectives are listed twice. All branches of a
    conditional are listed, although only one of them runs. An asynchronous pair is listed once. Collectives
    of groups of one device are left out, because they move nothing.

    Args:
        compiled_text: HLO text after partitioning.
        mesh: the mesh that the program was compiled for, which names axes; None names none.

    Raises:
        ValueError: the text has no entry computation, or groups in an unknown format.
    """
    return collectives_in(read_program(compiled_text), mesh)


def collectives_in(program: ProgramText, mesh: Mesh | None) -> list[Collective]:
    """Lists what `collectives_of` lists, of a text that has been read."""
    sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", program.header)
    num_devices = math.prod(map(int, sizes))
    if num_devices == 1 and mesh is not None:
        num_devices = mesh.size
    found = []
    for place in walk(program):
        instruction, opcode = place.instruction, place.instruction.opcode
        match = _COLLECTIVE.fullmatch(opcode)
        if not match:
            continue
        kind, result = match[1], instruction.result
        axes, group_size = _axes_and_size(instruction.attributes, num_devices, mesh)
        put_in = [operand_bytes(operand, place.computation) for operand in instruction.operands]
        if opcode.endswith("-start") and kind != "all-reduce":
            result = parts(result[1:-1])[1]  # (operands, results, what the backend keeps)
        if group_size > 1:
            found.append(
                Collective(
                    kind=kind,
                    axes=axes,
                    group_size=group_size,
                    # The other operands of a ragged one are the buffer to write to, offsets and sizes.
                    operand_bytes=put_in[0] if kind == "ragged-all-to-all" else sum(put_in),
                    result_bytes=type_bytes(result),
                    op_name=instruction.op_name,
                    loop_trip_count=place.runs,
                    in_loop=place.in_loop,
                    trips_known=place.runs_known,
                )
            )
    return found


def summary(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], int]:
    """Sums the bytes that a device sends in one run of the program, by kind and axes."""
    total: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for collective in collectives:
        total[collective.kind, collective.axes] += collective.total_bytes
    return dict(total)


def _axes_and_size(attributes: str, num_devices: int, mesh: Mesh | None) -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes that a collective's groups run along, and the size of its largest group.

    The devices of a program are numbered in the order of its mesh, whatever their ids.
    """
    pairs = _PAIRS.search(attributes)
    groups = _listed(pairs[1]) if pairs else _replica_groups(attributes, num_devices)
    size = max(map(len, _connected(groups) if pairs else groups), default=0)
    if mesh is None or size <= 1 or max(map(max, groups)) >= mesh.size:
        return (), size
    places = np.indices(mesh.devices.shape).reshape(mesh.devices.ndim, -1)
    along = {axis for group in groups for axis in np.flatnonzero(np.ptp(places[:, group], axis=1))}
    if not pairs:
        rest = [axis for axis in range(mesh.devices.ndim) if axis not in along]
        order = np.arange(mesh.size).reshape(mesh.devices.shape).transpose(*rest, *sorted(along))
        expected = order.reshape(-1, math.prod(mesh.devices.shape[axis] for axis in along))
        if sorted(map(sorted, groups)) != sorted(map(sorted, expected.tolist())):
            return (), size
    return tuple(mesh.axis_names[axis] for axis in sorted(along)), size


def _replica_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Parses the groups of a collective, for which HLO has three notations.

    Raises:
        ValueError: the format is unknown.
    """
    if match := _LISTED_GROUPS.search(attributes):
        return _listed(match[1]) or [list(range(num_devices))]
    if match := _IOTA_GROUPS.search(attributes):
        return _iota(*match.groups()[1:]).reshape(_numbers(match[1])).tolist()
    if match := _MESH_GROUPS.search(attributes):
        mesh_axes, dims, order, ids, references = match.groups()
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh_axes)]
        dims = dims or str(math.prod(size for _, size in axes))
        devices = np.array(_numbers(ids)) if ids else _iota(dims, order)
        return _along(devices, axes, _REFERENCE.findall(references)).tolist()
    raise ValueError(f"replica groups in an unknown format: {attributes!r}")


def _along(devices: np.ndarray, axes: list[tuple[str, int]], references: list[tuple[str, ...]]) -> np.ndarray:
    """Returns groups (number, size) along the referenced axes, or parts of axes, of XLA's own mesh.

    `'a':(p)s` is a part of the axis a: if the axis is reshaped to (p, s, rest), it is the axis of size s. The
    order of a group's devices is not kept.
    """
    shape: list[int] = []
    within: list[bool] = []
    for axis, size in axes:
        parts = [(int(p or 1), int(p or 1) * int(s or size)) for name, p, s in references if name == axis]
        cuts = sorted({1, size}.union(*parts))
        for low, high in itertools.pairwise(cuts):
            shape.append(high // low)
            within.append(any(start <= low and high <= end for start, end in parts))
    order = sorted(range(len(shape)), key=within.__getitem__)  # stable sort: the other axes come first
    size = math.prod(itertools.compress(shape, within))
    return devices.reshape(shape).transpose(order).reshape(-1, size)


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Expands XLA's `[4,2]T(1,0)`: numbers counted up in the given shape and transposed, as one row."""
    shape = _numbers(dims)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose(_numbers(order)) if order else numbers).ravel()


def _listed(groups: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([^}]+)\}", groups)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _connected(pairs: list[list[int]]) -> list[set[int]]:
    """Returns the sets of devices that pairs connect."""
    sets: dict[int, set[int]] = {}
    for source, target in pairs:
        joined = sets.get(source, {source}) | sets.get(target, {target})
        sets.update(dict.fromkeys(joined, joined))
    return list(sets.values())
