"""Reads the HLO text of a compiled program: its computations, their instructions, and where they come from.

The text is that of `jax.jit(f).lower(...).compile().as_text()`, on CPU, GPU or TPU.
"""

import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_ROOT = re.compile(r"\s+ROOT ")
_COMMENT = re.compile(r"/\*.*?\*/")
_PARENTHESIS = re.compile(r"[()]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations|update_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TRIPS = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')
"""Pattern of a loop's trip count. Older text has the backend's config as one string with escaped quotes."""
_CUSTOM_CALL = re.compile(r'custom_call_target="([^"]+)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_TABLE_ROW = re.compile(r'(\d+) (?:"([^"]*)"|\{(.*)\})$')
_FIELD = re.compile(r"(\w+)=(\d+)")
_LIBRARY = pathlib.Path(__file__).parents[1]


class Array(NamedTuple):
    """Describes an array of a program."""

    dtype: str
    """Name of the dtype in HLO, as in `f32`."""
    shape: tuple[int, ...]
    layout: str
    """Layout in HLO, as in `1,0:T(8,128)S(5)`; "" if the text has none."""

    @property
    def size(self) -> int:
        """Returns the number of values."""
        return math.prod(self.shape)

    @property
    def itemsize_bits(self) -> int:
        """Returns the bits of a value; those of less than a byte count as packed, and a token has none."""
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) if digits else 8 if self.dtype == "pred" else 0

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of the values, without padding."""
        return divide_up(self.size * self.itemsize_bits, 8)

    @property
    def padded_bytes(self) -> int:
        """Returns the bytes in memory, where the layout's first tile pads the last axes (on TPU)."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not order:
            return self.num_bytes
        sizes = [self.shape[int(axis)] for axis in order.split(",")]  # minor axes come first
        for position, length in enumerate(reversed(tile[1].split(","))):
            if position < len(sizes):
                sizes[position] = divide_up(sizes[position], int(length)) * int(length)
        return divide_up(math.prod(sizes) * self.itemsize_bits, 8)

    @property
    def is_in_host_memory(self) -> bool:
        """Tells whether the array is in host memory, XLA's memory space 5."""
        return "S(5)" in self.layout

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Instruction:
    """Holds one instruction of a computation."""

    name: str
    text: str
    """The instruction without its name."""
    is_root: bool

    @cached_property
    def _parts(self) -> tuple[str, str, str, str]:
        end = _closing(self.text, 0) + 1 if self.text.startswith("(") else self.text.index(" ")
        start = self.text.index("(", end)
        close = _closing(self.text, start)
        return (
            self.text[:end],
            self.text[end:start].strip(),
            self.text[start + 1 : close],
            self.text[close + 1 :],
        )

    @property
    def result(self) -> str:
        """Returns the type of the result as text."""
        return self._parts[0]

    @property
    def opcode(self) -> str:
        """Returns the name of the operation, as in `all-gather-start`."""
        return self._parts[1]

    @property
    def goes_on(self) -> bool:
        """Tells whether it continues or ends what another one started, whose computation it names."""
        return self.opcode.endswith(("-done", "-update"))

    @property
    def custom_call_target(self) -> str:
        """Returns the name of the function that a custom call calls; "" for other operations."""
        found = _CUSTOM_CALL.search(self.attributes)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        """Returns the operands as text: names, with or without their shapes before them."""
        return parts(self._parts[2])

    @property
    def operand_names(self) -> list[str]:
        """Returns the names of the operands."""
        return [operand.rsplit(" ", 1)[-1].lstrip("%") for operand in self.operands]

    @property
    def attributes(self) -> str:
        """Returns what follows the operands."""
        return self._parts[3]

    @property
    def op_name(self) -> str:
        """Returns JAX's path to the operation that it comes from; "" if the text has none."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def trip_count(self) -> int | None:
        """Returns the number of passes of a loop, if the compiler found it."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def arrays(self) -> list[Array]:
        """Returns the arrays of the result."""
        return arrays(self.result)

    @cached_property
    def called(self) -> list[tuple[str, str]]:
        """Returns the computations that it calls, each with its role, as (role, name)."""
        return [
            (role, name.strip().lstrip("%"))
            for role, names in _CALLED.findall(_STRING.sub("", self.attributes))
            for name in names.strip("{}").split(",")
            if name
        ]


Computation = Mapping[str, Instruction]
"""The instructions of a computation by name, in their order."""


@dataclass(frozen=True)
class ProgramText:
    """Holds the text of a program, by computations."""

    computations: Mapping[str, Computation]
    entry: str
    """Name of the computation that runs first."""
    header: str
    """The line that describes the module; "" if there is none."""
    frames: Mapping[int, tuple[str, int]]
    """File and line of every stack frame in the text."""
    parents: Mapping[int, int]
    """Frame that called a frame."""

    def source(self, instruction: Instruction) -> str:
        """Returns where an instruction comes from, as in `ultramem_jax/ops/topk.py:45`; "" if unknown.

        This is the innermost line of this library, or else the innermost of all.
        """
        if found := _SOURCE.search(instruction.attributes):
            return _short(found[1], int(found[2]))
        found = _FRAME.search(instruction.attributes)
        frame = int(found[1]) if found else 0
        innermost = ""
        while frame in self.frames:
            file, line = self.frames[frame]
            if _library_path(file):
                return _short(file, line)
            innermost, frame = innermost or _short(file, line), self.parents.get(frame, 0)
        return innermost


def read_program(text: str) -> ProgramText:
    """Reads the text of a program.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, header, table = "", "", ""
    inside: dict[str, Instruction] | None = None
    for line in text.splitlines():
        line = _COMMENT.sub("", line)
        if line.startswith("HloModule "):
            header = line
        elif line.startswith("}"):
            inside = None
        elif inside is not None:
            if match := _INSTRUCTION.match(line):
                inside[match[1]] = Instruction(match[1], match[2], _ROOT.match(line) is not None)
        elif match := _TABLE_ROW.match(line):
            tables.setdefault(table, {})[int(match[1])] = match[2] if match[2] is not None else match[3]
        elif match := _COMPUTATION.match(line):
            inside = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        else:
            table = line.strip()
    if not entry:
        raise ValueError("no entry computation: this is not the HLO text of a program")
    return ProgramText(computations, entry, header, *_frames(tables))


def _frames(tables: Mapping[str, Mapping[int, str]]) -> tuple[dict[int, tuple[str, int]], dict[int, int]]:
    places, frames, parents = {}, {}, {}
    files = tables.get("FileNames", {})
    for number, row in tables.get("FileLocations", {}).items():
        fields = {name: int(value) for name, value in _FIELD.findall(row)}
        places[number] = files.get(fields.get("file_name_id", 0), ""), fields.get("line", 0)
    for number, row in tables.get("StackFrames", {}).items():
        fields = {name: int(value) for name, value in _FIELD.findall(row)}
        frames[number] = places.get(fields.get("file_location_id", 0), ("", 0))
        # Parents are counted from one more than frames, so that the first frame has none.
        parents[number] = fields.get("parent_frame_id", 1) - 1
    return frames, parents


def _short(file: str, line: int) -> str:
    path = _library_path(file) or "/".join(file.split("/")[-2:])
    return f"{path}:{line}" if path else ""


@cache
def _library_path(file: str) -> str:
    """Returns the path of a file of this library, as in `ultramem_jax/ops/topk.py`; "" of other files."""
    _, found, inside = f"/{file}".rpartition("/ultramem_jax/")
    # A checkout of the repository may have the library's name, too.
    is_own = found and (_LIBRARY / inside.partition("/")[0]).exists()
    return f"ultramem_jax/{inside}" if is_own else ""


def _closing(text: str, start: int) -> int:
    """Returns the index at which the parenthesis that opens at `start` closes.

    Raises:
        ValueError: it does not close.
    """
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text!r}")


def parts(text: str) -> list[str]:
    """Splits a text at commas outside of all brackets."""
    found, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append(text[start:position].strip())
            start = position + 1
    return [*found, text[start:].strip()]


def operand_bytes(operand: str, computation: Computation) -> int:
    """Returns the bytes of an operand, which is printed as a name, with or without its shape before it."""
    return type_bytes(operand if "[" in operand else computation[operand.lstrip("%")].result)


def arrays(shape: str) -> list[Array]:
    """Returns the arrays in a type."""
    return [
        Array(dtype, tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size), layout)
        for dtype, sizes, layout in _ARRAY.findall(shape)
    ]


def type_bytes(shape: str) -> int:
    """Returns the bytes of all arrays in a type, without padding."""
    return sum(array.num_bytes for array in arrays(shape))


def divide_up(dividend: int, divisor: int) -> int:
    """Returns the quotient, rounded up."""
    return -(-dividend // divisor)


class Place(NamedTuple):
    """Names an instruction at one place where it is called."""

    instruction: Instruction
    computation: Computation
    """The computation that holds it."""
    runs: int = 1
    """Number of its runs in one run of the program: the product over the loops around it. A loop whose count
    the compiler did not find counts as one pass."""
    in_loop: bool = False
    """Whether it is in a loop."""
    runs_known: bool = True
    """Whether the compiler found the count of every loop around it; True outside loops."""
    is_fused: bool = False
    """Whether it is part of another instruction, which is one kernel."""


def walk(program: ProgramText) -> Iterator[Place]:
    """Yields the instructions of a program at every place where they are called.

    Instructions of a computation that is called from two places come twice, and so do all branches of a
    conditional, although only one of them runs.
    """
    yield from _walk(program, program.entry, {})


def _walk(program: ProgramText, name: str, around: dict[str, Any]) -> Iterator[Place]:
    computation = program.computations[name]
    for instruction in computation.values():
        place = Place(instruction, computation, **around)
        yield place
        opcode = instruction.opcode
        if instruction.goes_on:
            continue
        for role, called in instruction.called:
            inner = {name: getattr(place, name) for name in ("runs", "in_loop", "runs_known", "is_fused")}
            if opcode == "while":
                count = instruction.trip_count
                # The condition runs once more than the body.
                inner["runs"] *= 1 if count is None else count + (role == "condition")
                inner |= {"in_loop": True, "runs_known": place.runs_known and count is not None}
            elif opcode not in ("conditional", "call"):
                inner["is_fused"] = True
            yield from _walk(program, called, inner)
