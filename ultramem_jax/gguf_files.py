"""Reads GGUF files, llama.cpp's format of models: metadata, and tensors that are dequantized one by one.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The head of a file is read
here: the package's reader takes 11 s and 570 MB for a vocabulary of 150,000 tokens and as many merges (a view
of the file for every number), and counts on without an end where a broken length leads it beyond the file.
The package decodes the quantized types.
"""

import dataclasses
import functools
import math
import os
import stat
import struct
from collections.abc import Mapping
from types import ModuleType
from typing import IO

import numpy as np

from ultramem_jax.errors import UserError, one_line, require

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata types of numbers, as `struct` names them."""
_TEXT, _LIST = 8, 9
"""The other metadata types."""
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}
"""Types of floats that are no blocks; the bits of a bfloat16 are read as an integer."""
_INTEGERS = ("I8", "I16", "I32", "I64")

# What a file of a model has stays far below these; a broken length is refused before memory is taken for it.
_LONGEST_NAME = 1024
_LONGEST_TEXT = 1 << 26
_LONGEST_LIST = 1 << 22
_MOST_DIMENSIONS = 4

_CHUNK = 1 << 18
"""Numbers that are dequantized at a time, as the decoders make several arrays of their size."""


@dataclasses.dataclass(frozen=True)
class _Type:
    """Describes a type of tensors: its name, and the numbers and bytes of a block."""

    number: int
    name: str
    block: int
    size: int

    def bytes_of(self, count: int) -> int:
        """Returns the bytes of `count` numbers, which are whole blocks."""
        return count // self.block * self.size


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Says where the bytes of a tensor begin, and what they are."""

    shape: tuple[int, ...]
    type: _Type
    start: int


class GgufFile:
    """Gives the metadata and the tensors of one GGUF file; the file is open only while something is read.

    Attributes:
        path: of the file, as it was given.
        fields: the metadata by key: numbers, booleans, strings, and lists of them.
        shapes: the shape of every tensor by name in NumPy's order, which is the reverse of GGUF's.
    """

    def __init__(
        self, path: str | os.PathLike[str], fields: dict[str, object], stored: Mapping[str, _Stored]
    ) -> None:
        self.path = os.fspath(path)
        self.fields = fields
        self.shapes = {name: entry.shape for name, entry in stored.items()}
        self._stored = stored

    def dtype(self, name: str) -> str:
        """Returns the type of a tensor as GGUF names it, such as `F32` or `Q4_K`."""
        return self._stored[name].type.name

    def require_floats(self, name: str) -> None:
        """Refuses a tensor that `read` cannot give as floats.

        Raises:
            UserError: it is one of integers, or of a type that the package `gguf` cannot dequantize.
        """
        kind, field = self._stored[name].type, f"{self.path}: {name}.dtype"
        require(kind.name not in _INTEGERS, field, kind.name, "must be floats, plain or quantized")
        decodes = kind.name in _PLAIN or _decodes(kind.number, kind.size)
        require(decodes, field, kind.name, "the package gguf cannot dequantize it")

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in host memory of its own.

        Args:
            name: of the tensor, one of `shapes`.

        Returns:
            The tensor in its shape: F32, F16, BF16 and F64 in their own dtypes, quantized types as float32.

        Raises:
            UserError: it holds no floats; its type cannot be dequantized; the file can no longer be read.
        """
        return self._read(name, self.shapes[name], 0)

    def read_part(self, name: str, index: int) -> np.ndarray:
        """Returns one slice along the first axis, such as one of stacked experts, and reads no other.

        Args:
            name: of the tensor, which has at least two axes.
            index: of the slice, not negative.

        Returns:
            The slice without the first axis, as `read` returns a tensor.

        Raises:
            UserError: as for `read`; there is no such slice.
        """
        shape = self.shapes[name]
        count = shape[0] if len(shape) > 1 else 0
        require(0 <= index < count, f"{self.path}: slice of {name}", index, f"must be in [0, {count})")
        return self._read(name, shape[1:], index)

    def _read(self, name: str, shape: tuple[int, ...], index: int) -> np.ndarray:
        """Returns the numbers of `shape` that follow `index` others of that shape in a tensor."""
        self.require_floats(name)
        kind, count = self._stored[name].type, math.prod(shape)
        start = self._stored[name].start + index * kind.bytes_of(count)
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                numbers = _plain(file, kind, count) if kind.name in _PLAIN else _decoded(file, kind, count)
        except (OSError, EOFError) as error:
            raise UserError(f"{self.path}: {name} cannot be read: {one_line(error)}") from None
        return numbers.reshape(shape)


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Reads the metadata of a GGUF file and the list of its tensors, whose numbers stay in the file.

    Args:
        path: of a whole file; one of several that a model is split into is read as it is.

    Raises:
        UserError: the package `gguf` is missing; the file is missing, not a regular one, cannot be opened, is
            no GGUF file, big-endian, broken, or shorter than its tensors; it has a type of tensors that the
            package does not know.
    """
    _require_regular(path)
    package = _package(path)
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            head = _Head(path, file)
            tensors = head.version_and_tensors()
            fields = head.fields()
            return GgufFile(path, fields, head.stored(tensors, _alignment(path, fields), package))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def _require_regular(path: str | os.PathLike[str]) -> None:
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, ValueError):  # ValueError: a path with a zero byte
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    if not regular:  # a pipe would wait for a writer
        raise UserError(f"{path}: cannot be read: not a regular file")


class _Head:
    """Walks through the head of a file, and never beyond the end of the file."""

    def __init__(self, path: str | os.PathLike[str], file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._at = 0
        self._entries = 0

    def version_and_tensors(self) -> int:
        """Returns the number of tensors, after the checks of what stands before it."""
        if self._size < len(_MAGIC) or self._take(len(_MAGIC), "the magic number") != _MAGIC:
            raise UserError(f"{self._path}: not a GGUF file: it does not begin with 'GGUF'")
        version = int(self._number("I", "the version"))
        if version & 0xFFFF == 0:
            raise UserError(f"{self._path}: a big-endian GGUF file; only little-endian ones are read")
        require(version in _VERSIONS, f"{self._path}: version of GGUF", version, "must be 2 or 3")
        tensors = int(self._number("Q", "the number of tensors"))
        self._entries = int(self._number("Q", "the number of metadata"))
        return tensors

    def fields(self) -> dict[str, object]:
        """Returns the metadata."""
        fields: dict[str, object] = {}
        for _ in range(self._entries):
            key = self._name("a key of the metadata", fields)
            fields[key] = self._value(int(self._number("I", key)), key)
        return fields

    def stored(self, count: int, alignment: int, package: ModuleType) -> dict[str, _Stored]:
        """Returns where the tensors are, which follow each other after the head."""
        types, stored, follows = _types(package), dict[str, _Stored](), 0
        for _ in range(count):
            name = self._name("the name of a tensor", stored)
            shape = self._shape(name)
            number, start = (int(self._number(code, name)) for code in "IQ")
            require(number in types, f"{self._path}: {name}.dtype", number, "a type that gguf does not know")
            kind = types[number]
            if shape[-1] % kind.block:
                blocks = f"must end on a multiple of {kind.block}, a block of {kind.name}"
                require(False, f"{self._path}: {name}.shape", shape, blocks)
            require(start == follows, f"{self._path}: offset of {name}", start, f"must be {follows}")
            stored[name] = _Stored(shape, kind, start)
            follows += _aligned(kind.bytes_of(math.prod(shape)), alignment)
        first = _aligned(self._at, alignment)
        for name, entry in stored.items():
            self._require_bytes(first + entry.start + entry.type.bytes_of(math.prod(entry.shape)), name)
        return {name: dataclasses.replace(e, start=first + e.start) for name, e in stored.items()}

    def _shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        count = int(self._number("I", name))
        allowed = f"must be in [1, {_MOST_DIMENSIONS}]"
        require(1 <= count <= _MOST_DIMENSIONS, f"{self._path}: dimensions of {name}", count, allowed)
        shape = tuple(int(self._number("Q", name)) for _ in range(count))[::-1]
        require(0 not in shape, f"{self._path}: {name}.shape", shape, "must be lengths of at least 1")
        return shape

    def _value(self, kind: int, key: str) -> object:
        """Returns the value of a key."""
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], key)
        if kind == _TEXT:
            return self._text(key, _LONGEST_TEXT)
        require(kind == _LIST, f"{self._path}: type of {key}", kind, "a type that GGUF does not have")
        item, count = (int(self._number(code, key)) for code in "IQ")
        allowed = f"must be at most {_LONGEST_LIST:,}"
        require(count <= _LONGEST_LIST, f"{self._path}: length of {key}", count, allowed)
        if item in _NUMBERS:
            values = struct.Struct(f"<{count}{_NUMBERS[item]}")
            return list(values.unpack(self._take(values.size, key)))
        require(item == _TEXT, f"{self._path}: type of {key}'s items", item, "must be numbers or strings")
        return [self._text(key, _LONGEST_TEXT) for _ in range(count)]

    def _name(self, what: str, known: Mapping[str, object]) -> str:
        """Returns a key or the name of a tensor, which no other has and which stands on one line."""
        name = self._text(what, _LONGEST_NAME)
        require(name != "" and name.isprintable(), f"{self._path}: {what}", name, "must be printable")
        require(name not in known, f"{self._path}: {what}", name, "must not be there twice")
        return name

    def _text(self, what: str, longest: int) -> str:
        (length,) = struct.unpack("<Q", self._take(8, what))
        require(length <= longest, f"{self._path}: length of {what}", length, f"must be at most {longest:,}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise UserError(f"{self._path}: {what}: must be text in UTF-8") from None

    def _number(self, code: str, what: str) -> float:
        """Returns a number, or a boolean; the type is that of its code."""
        values = struct.Struct(f"<{code}")
        value: float = values.unpack(self._take(values.size, what))[0]
        return value

    def _take(self, count: int, what: str) -> bytes:
        """Returns the next bytes of the file."""
        self._at += count
        self._require_bytes(self._at, what)
        data = self._file.read(count)
        if len(data) < count:
            raise UserError(f"{self._path}: became shorter while it was read")
        return data

    def _require_bytes(self, end: int, what: str) -> None:
        if end > self._size:
            broken = f"{what} would end at byte {end:,} of {self._size:,}"
            raise UserError(f"{self._path}: not a whole GGUF file: {broken}")


def _plain(file: IO[bytes], kind: _Type, count: int) -> np.ndarray:
    """Reads floats that are stored as such."""
    numbers = np.fromfile(file, _PLAIN[kind.name], count)
    if numbers.size < count:
        raise EOFError("the file has become shorter")
    if kind.name != "BF16":
        return numbers
    import jax.numpy as jnp  # which brings the dtype; whoever reads other tensors needs no JAX

    return numbers.view(jnp.bfloat16)


def _decoded(file: IO[bytes], kind: _Type, count: int) -> np.ndarray:
    """Reads blocks of a quantized type and returns their numbers as float32."""
    numbers = np.empty(count, np.float32)
    step = max(1, _CHUNK // kind.block) * kind.block
    for first in range(0, count, step):
        chunk = numbers[first : first + step]
        stored = np.fromfile(file, np.uint8, kind.bytes_of(chunk.size))
        if stored.size < kind.bytes_of(chunk.size):
            raise EOFError("the file has become shorter")
        chunk[:] = _dequantized(stored, kind.number)
    return numbers


def _dequantized(stored: np.ndarray, number: int) -> np.ndarray:
    """Returns the numbers of whole blocks; broken scales give infinities or NaN without a warning."""
    package = _package()
    with np.errstate(all="ignore"):
        decoded: np.ndarray = package.quants.dequantize(stored[None], package.GGMLQuantizationType(number))
    return decoded[0]


@functools.cache
def _decodes(number: int, size: int) -> bool:
    """Returns whether the package decodes a type, of which a block has `size` bytes."""
    try:
        _dequantized(np.zeros(size, np.uint8), number)
    except NotImplementedError:
        return False
    return True


def _types(package: ModuleType) -> dict[int, _Type]:
    """Returns the types that the package knows, by their numbers in a file."""
    sizes = package.GGML_QUANT_SIZES.items()
    return {int(kind): _Type(int(kind), kind.name, block, size) for kind, (block, size) in sizes}


def _package(path: str | os.PathLike[str] | None = None) -> ModuleType:
    """Imports the optional package `gguf`; `path` is the file that needs it, for the message."""
    try:
        import gguf
    except ImportError:
        where = "" if path is None else f"{path}: "
        raise UserError(f'{where}needs the package gguf: pip install "ultramem_jax[gguf]"') from None
    return gguf


def _alignment(path: str | os.PathLike[str], fields: Mapping[str, object]) -> int:
    """Returns the bytes of which every tensor begins at a multiple; 32 where the file does not say."""
    value = fields.get("general.alignment", 32)
    power_of_two = type(value) is int and 0 < value < 1 << 32 and value & (value - 1) == 0
    require(power_of_two, f"{path}: general.alignment", value, "must be a power of two")
    assert isinstance(value, int)
    return value


def _aligned(position: int, alignment: int) -> int:
    """Returns the first multiple of `alignment` from `position` on."""
    return -(-position // alignment) * alignment
