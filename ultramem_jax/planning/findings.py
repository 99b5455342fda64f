"""Finds in the text of a compiled program what costs time or memory on an accelerator.

These are copies of tables, sorts, scatters, solvers, dense expansions of ragged products, transfers to the
host and padded arrays, each with the line of source that it comes from.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ultramem_jax.parallel.program_text import (
    Array,
    Computation,
    Instruction,
    Place,
    ProgramText,
    arrays,
    walk,
)

VERSION = 5
"""Number of this search. Raise it with every change to what is found."""
_FREE = frozenset(
    [
        "parameter",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "while",
        "conditional",
        "call",
        "optimization-barrier",
        "opt-barrier",
    ]
)
"""Operations that neither start a kernel of their own nor make an array."""
_IN_PLACE = _FREE | {"fusion", "scatter", "dynamic-update-slice", "async"}
"""Operations that do not make an array of their result's size, or write into one in place."""
_NO_KERNEL = _FREE | {"constant", "iota", "after-all", "partition-id", "replica-id"}
"""Operations that start no kernel of their own."""
_NOTES = frozenset(["AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "Sharding"])
"""Custom calls of the TPU's compiler that only carry knowledge about an array."""
_SOLVERS = re.compile(
    r"(?:^|/)(?:svd|qr|eigh?|cholesky|geqrf|geqp3|lu|lu_pivots_to_permutation|householder_product|"
    r"triangular_solve|schur|hessenberg|tridiagonal\w*)$"
)
"""Last parts of JAX's paths to operations of linear algebra."""
_SOLVER_TARGETS = re.compile(
    r"cusolver|lapack|rocsolver|Cholesky|QrDecomposition|InvertDiagBlocks|Eigh", re.I
)
_TOP_K_TARGETS = re.compile(r"top_?k|PartialReduce|DeviceRadixSort|cub.*sort", re.I)
_HOST_TARGETS = re.compile(r"callback|MoveToHost|MoveToDevice|annotate_device_placement", re.I)
_DIMENSION = re.compile(r"\bdimensions=\{(\d+)\}")
_RAGGED = re.compile(r"(?:^|/)ragged_dot\w*$")
"""Last part of JAX's path to a ragged product."""
_DOTS = ("dot", "convolution")
_GEMMS = re.compile(r"cublas|cudnn|__gpu\$\w*gemm", re.I)
_COMBINES = ("add", "multiply", "maximum", "minimum")
CONTENDED = ("atomic", "one by one")
"""First words of scatters whose updates wait for each other."""
_LEAST_BYTES = 1 << 20
"""Bytes of arrays that are worth a finding."""
_SAME_VALUES = frozenset(["bitcast", "copy", "convert", "reshape", "transpose"])
"""Operations whose result has the values of their operand."""
_MOST_ROWS_ADDED = 0.05
"""Share of a table's rows by which an array that is taken for a copy of it may be longer."""


@dataclass(frozen=True)
class Finding:
    """Describes one thing that was found, at one place of the source."""

    what: str
    """Its kind, for example `atomic` of a scatter, and its shape, as in HLO."""
    source: str
    """Line of the source that it comes from; "" if unknown."""
    times: int
    """Number of its runs in one run of the program, over all places that are alike."""
    width: int = 0
    """Width of the rows of a sort; 0 for everything else."""


@dataclass(frozen=True)
class Findings:
    """Holds what was found in a program."""

    kernels: int
    """Kernels that one run starts, with loops whose count is not known as one pass."""
    unbounded_loops: Sequence[Finding]
    """Loops whose count is not known, for which a GPU asks the host after every pass."""
    table_copies: Sequence[Finding]
    sorts: Sequence[Finding]
    """Sorts of rows, and of arrays with one axis (`width` 0)."""
    scatters: Sequence[Finding]
    """`atomic`: combines floats at indices that may be equal. `unique`, `sorted`, `any order`: all others.
    `one by one`: a loop that stands for a scatter."""
    solvers: Sequence[Finding]
    custom_calls: Sequence[Finding]
    """Kernels of libraries and of the compiler."""
    dense_ragged: Sequence[Finding]
    """Ragged products that became a product of every row with every group."""
    host_transfers: Sequence[Finding]
    """Calls of the host, and what reads or writes host memory; programs for GPUs do not name the latter."""
    padded: Sequence[Finding]
    """Arrays of 1 MiB and more whose layout makes them at least twice as large."""


NOTHING = Findings(0, *(() for _ in range(9)))
"""Findings of a program that has not been searched."""


def find(program: ProgramText, tables: Sequence[tuple[int, ...]]) -> Findings:
    """Looks through a program.

    Args:
        program: the text of a compiled program.
        tables: shapes of the arrays of tables and their moments, as one device holds them.
    """
    found: dict[str, dict[tuple[str, str, int], int]] = {}
    kernels = 0
    for place in walk(program):
        instruction = place.instruction
        if not place.is_fused and _starts_kernel(instruction):
            kernels += place.runs
        for kind, what, width in _kinds(place, program, tables):
            key = what, program.source(instruction), width
            of_kind = found.setdefault(kind, {})
            of_kind[key] = of_kind.get(key, 0) + place.runs

    def of(kind: str) -> tuple[Finding, ...]:
        return tuple(
            Finding(what, source, times, width)
            for (what, source, width), times in found.get(kind, {}).items()
        )

    return Findings(
        kernels,
        *(
            of(kind)
            for kind in (
                "loop",
                "table",
                "sort",
                "scatter",
                "solver",
                "call",
                "ragged",
                "host",
                "padded",
            )
        ),
    )


def _starts_kernel(instruction: Instruction) -> bool:
    # What goes on beside other work is one kernel, at its start.
    is_work = instruction.opcode not in _NO_KERNEL and instruction.custom_call_target not in _NOTES
    return is_work and not instruction.goes_on


def _kinds(
    place: Place, program: ProgramText, tables: Sequence[tuple[int, ...]]
) -> Iterator[tuple[str, str, int]]:
    """Yields (kind, description, width of a sort's rows) for every finding in an instruction."""
    instruction, opcode = place.instruction, place.instruction.opcode
    if instruction.goes_on:
        return  # found at its start
    begins, opcode = opcode.endswith("-start"), opcode.removesuffix("-start")
    # A start's result also holds its operands, and what the device notes.
    result = instruction.arrays[:1] if begins else instruction.arrays
    target = instruction.custom_call_target
    if opcode == "while" and instruction.trip_count is None:
        yield "loop", f"{len(result)} arrays", 0
    if opcode not in _IN_PLACE and not _is_aliased(instruction):
        for array in result:
            if any(_is_like(array, table) and not _is_gathered(place, table) for table in tables):
                yield "table", f"{opcode} {array}", 0
    if opcode in ("sort", "topk") or _TOP_K_TARGETS.search(target):
        dimension = _DIMENSION.search(instruction.attributes)
        keys = result[0] if opcode == "sort" else _operand(instruction, place.computation)
        axis = int(dimension[1]) if dimension else len(keys.shape) - 1
        width = keys.shape[axis] if keys.shape else 0
        yield "sort", f"{target or opcode} {keys} ({len(result)} arrays)", width if width < keys.size else 0
    last = instruction.op_name.rpartition("/")[2]
    if opcode == "scatter":
        yield "scatter", _scatter(instruction, program), 0
    elif opcode == "while" and last.startswith("scatter"):
        yield "scatter", f"one by one, {last}", 0
    solves = _SOLVERS.search(instruction.op_name) and not place.is_fused and opcode not in _NO_KERNEL
    if _SOLVER_TARGETS.search(target) or solves:
        yield "solver", f"{target or opcode} {last}", 0
    if target and target not in _NOTES:
        yield "call", target, 0
    if (opcode in _DOTS or _GEMMS.search(target)) and _RAGGED.search(last):
        # A kernel for ragged products is another kind of call. A plain product has all rows and all groups.
        yield "ragged", f"{target or opcode} {result[0]}", 0
    if _goes_to_host(instruction, place.computation):
        yield "host", f"{target or opcode} {result[0] if result else ''}".rstrip(), 0
    if not place.is_fused and opcode not in _NO_KERNEL:
        for array in result:
            if array.padded_bytes >= max(2 * array.num_bytes, _LEAST_BYTES):
                yield (
                    "padded",
                    f"{array}{{{array.layout}}}: {array.padded_bytes / array.num_bytes:.3g} times",
                    0,
                )


def _is_like(array: Array, table: tuple[int, ...]) -> bool:
    """Tells whether an array is a table, in any dtype that holds its values.

    From `_LEAST_BYTES` on, also in another shape or with a few more rows: smaller arrays are too often of the
    same size by chance.
    """
    if array.dtype.startswith(("pred", "s")):
        return False
    if array.shape == table or array.num_bytes < _LEAST_BYTES:
        return array.shape == table
    rows = math.prod(table[:-1])
    more_rows = array.size // table[-1] - rows
    is_longer = array.shape[-1:] == table[-1:] and 0 <= more_rows <= _MOST_ROWS_ADDED * rows
    return array.size == math.prod(table) or (len(table) > 1 and is_longer)


def _is_gathered(place: Place, table: tuple[int, ...]) -> bool:
    """Tells whether an instruction gathers as many rows as a table has, from an array that is no table.

    Where every row is read, their gradients are such an array.
    """
    instruction: Instruction | None = place.instruction
    while instruction is not None and instruction.opcode in _SAME_VALUES:
        instruction = place.computation.get(instruction.operand_names[0])
    if instruction is None or instruction.opcode != "gather":
        return False
    return not _is_like(_operand(instruction, place.computation), table)


def _is_aliased(instruction: Instruction) -> bool:
    return "output_to_operand_aliasing" in instruction.attributes


def _goes_to_host(instruction: Instruction, computation: Computation) -> bool:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("infeed", "outfeed") or _HOST_TARGETS.search(instruction.custom_call_target):
        return True
    if opcode in ("send", "recv"):
        return "is_host_transfer=true" in instruction.attributes
    if opcode in _FREE:
        return False
    results = [array for array in instruction.arrays if array.shape]
    operands = [
        array
        for name in instruction.operand_names
        if name in computation
        for array in computation[name].arrays
    ]
    return any(array.is_in_host_memory for array in (*results, *operands))


def _scatter(instruction: Instruction, program: ProgramText) -> str:
    flags = instruction.attributes
    array = instruction.arrays[0]
    combiner = next((name for role, name in instruction.called if role == "to_apply"), "")
    how = next((opcode for opcode in _opcodes(combiner, program) if opcode in _COMBINES), "")
    is_float = re.match(r"bf16|f\d", array.dtype) is not None
    if "unique_indices=true" in flags:
        kind = "unique"
    elif how and is_float:
        kind = "atomic"
    else:
        kind = "sorted" if "indices_are_sorted=true" in flags else "any order"
    return f"{kind} {f'{how} to' if how else 'write to'} {array}"


def _opcodes(name: str, program: ProgramText) -> Iterator[str]:
    """Yields the operations of a computation and of those that it calls."""
    for instruction in program.computations.get(name, {}).values():
        yield instruction.opcode
        for _, called in instruction.called:
            yield from _opcodes(called, program)


def _operand(instruction: Instruction, computation: Computation) -> Array:
    """Returns the first array of the first operand."""
    found = arrays(instruction.operands[0])
    if not found:
        found = computation[instruction.operand_names[0]].arrays
    return found[0] if found else Array("token", (), "")
