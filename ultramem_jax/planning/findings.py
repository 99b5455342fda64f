"""Finds in the text of a compiled program what costs time or memory on an accelerator.

These are copies of tables, sorts, scatters, solvers, dense expansions of ragged products, transfers to the
host and padded arrays, each with the line of source that it comes from.
"""

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

VERSION = 2
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
        "copy-done",
        "async-done",
        "async-update",
    ]
)
"""Operations that neither start a kernel of their own nor make an array."""
_IN_PLACE = _FREE | {"fusion", "scatter", "dynamic-update-slice", "async-start"}
"""Operations that do not make an array of their result's size, or write into one in place."""
_NO_KERNEL = _FREE | {"constant", "iota", "after-all", "partition-id", "replica-id"}
"""Operations that start no kernel of their own."""
_SOLVERS = re.compile(
    r"(?:^|/)(?:svd|qr|eigh|cholesky|geqrf|geqp3|lu|lu_pivots_to_permutation|householder_product|"
    r"triangular_solve|schur|hessenberg|tridiagonal\w*)$"
)
"""Last parts of JAX's paths to operations of linear algebra."""
_SOLVER_TARGETS = re.compile(
    r"cusolver|lapack|rocsolver|Cholesky|QrDecomposition|InvertDiagBlocks|Eigh", re.I
)
_TOP_K_TARGETS = re.compile(r"top_?k|PartialReduce|DeviceRadixSort|cub.*sort", re.I)
_HOST_TARGETS = re.compile(r"callback|MoveToHost|MoveToDevice|annotate_device_placement", re.I)
_CUSTOM_CALL = re.compile(r'custom_call_target="([^"]+)"')
_DIMENSION = re.compile(r"\bdimensions=\{(\d+)\}")
_RAGGED = re.compile(r"ragged_dot")
_DOTS = ("dot", "convolution")
_GEMMS = re.compile(r"cublas|gemm|cudnn|triton", re.I)
_LEAST_PADDED_BYTES = 1 << 20


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
    """`atomic`: adds floats at indices that may be equal. `unique`, `sorted`, `any order`: all others."""
    solvers: Sequence[Finding]
    custom_calls: Sequence[Finding]
    """Kernels of libraries and of the compiler."""
    dense_ragged: Sequence[Finding]
    """Ragged products that became a product of every row with every group."""
    host_transfers: Sequence[Finding]
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
        if not place.is_fused and instruction.opcode not in _NO_KERNEL:
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


def _kinds(
    place: Place, program: ProgramText, tables: Sequence[tuple[int, ...]]
) -> Iterator[tuple[str, str, int]]:
    """Yields (kind, what, width of a sort's rows) of everything that an instruction is."""
    instruction, opcode = place.instruction, place.instruction.opcode
    result = instruction.arrays
    target = _CUSTOM_CALL.search(instruction.attributes) if opcode == "custom-call" else None
    if opcode == "while" and instruction.trip_count is None:
        yield "loop", f"{len(result)} arrays", 0
    if opcode not in _IN_PLACE:
        for array in result:
            if array.shape in tables:
                yield "table", f"{opcode} {array}", 0
    if opcode == "sort" or (target and _TOP_K_TARGETS.search(target[1])):
        dimension = _DIMENSION.search(instruction.attributes)
        keys = _operand(instruction, place.computation) if target else result[0]
        axis = int(dimension[1]) if dimension else len(keys.shape) - 1
        width = keys.shape[axis] if keys.shape else 0
        name = target[1] if target else "sort"
        yield "sort", f"{name} {keys} ({len(result)} arrays)", width if width < keys.size else 0
    if opcode == "scatter":
        yield "scatter", _scatter(instruction, program), 0
    last = instruction.op_name
    if (target and _SOLVER_TARGETS.search(target[1])) or (_SOLVERS.search(last) and not place.is_fused):
        yield "solver", f"{target[1] if target else opcode} {last.rpartition('/')[2]}", 0
    if target:
        yield "call", target[1], 0
    is_product = opcode in _DOTS or (target is not None and _GEMMS.search(target[1]) is not None)
    if is_product and _RAGGED.search(last) and _is_expanded(instruction, place.computation):
        yield "ragged", f"{opcode} {result[0]}", 0
    if opcode in ("infeed", "outfeed", "send", "recv") or (target and _HOST_TARGETS.search(target[1])):
        yield "host", f"{target[1] if target else opcode}", 0
    elif opcode in ("copy", "copy-start") and not place.is_fused:
        spaces = {array.is_in_host_memory for array in result if array.shape}
        operand = _operand(instruction, place.computation)
        if len(spaces) > 1 or (spaces and operand.is_in_host_memory not in spaces):
            yield "host", f"{opcode} {result[0]}", 0
    if not place.is_fused and opcode not in _NO_KERNEL:
        for array in result:
            if array.padded_bytes >= max(2 * array.num_bytes, _LEAST_PADDED_BYTES):
                yield (
                    "padded",
                    f"{array}{{{array.layout}}}: {array.padded_bytes / array.num_bytes:.3g} times",
                    0,
                )


def _scatter(instruction: Instruction, program: ProgramText) -> str:
    flags = instruction.attributes
    array = instruction.arrays[0]
    combiner = next(
        (program.computations[name] for role, name in instruction.called if role == "to_apply"), {}
    )
    root = next((inner for inner in combiner.values() if inner.is_root), None)
    adds = root is not None and root.opcode in ("add", "multiply", "fusion")
    is_float = re.match(r"bf16|f\d", array.dtype) is not None
    if "unique_indices=true" in flags:
        kind = "unique"
    elif adds and is_float:
        kind = "atomic"
    else:
        kind = "sorted" if "indices_are_sorted=true" in flags else "any order"
    return f"{kind} {'add to' if adds else 'write to'} {array}"


def _operand(instruction: Instruction, computation: Computation) -> Array:
    """Returns the first array of the first operand."""
    found = arrays(instruction.operands[0])
    if not found:
        found = computation[instruction.operand_names[0]].arrays
    return found[0] if found else Array("token", (), "")


def _is_expanded(instruction: Instruction, computation: Computation) -> bool:
    """Tells whether a ragged product takes more than its own rows: its left side or result has groups."""
    return any(
        len(array.shape) > 2 for array in (*instruction.arrays[:1], _operand(instruction, computation))
    )
