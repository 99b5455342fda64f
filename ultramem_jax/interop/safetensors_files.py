"""Reads and writes state dicts as `.safetensors` files."""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ultramem_jax.errors import UserError, one_line, require

DTYPES: dict[str, np.dtype] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
    }.items()
}
"""Dtypes of the format that NumPy can hold. The format has others, of floats of 4 to 8 bits, which need
scales too."""
_LONGEST_HEADER = 100_000_000
"""Most bytes of a header, as in the format's own reader."""


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by name, with their stored dtypes.

    Raises:
        UserError: the file is missing, not a regular one, cannot be opened, or is broken; NumPy has no dtype
            for an array.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for a writer
        raise UserError(f"{path}: cannot be read: not a regular file")
    require_dtypes(path)
    try:
        return safetensors.numpy.load_file(path)
    except (FileNotFoundError, ValueError):  # ValueError: a path with a zero byte
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a whole .safetensors file: {one_line(error)}") from None


def write_safetensors(path: str | os.PathLike[str], state: Mapping[str, object]) -> None:
    """Writes the arrays of `state` with their names and dtypes. The folder is created if it is missing.

    The file appears whole or not at all: another of the same name stays until the new one is complete.

    Raises:
        UserError: `state` is no mapping; an entry has no array that the format and `read_safetensors` know;
            the file cannot be written.
    """
    path = pathlib.Path(path)
    if not isinstance(state, Mapping):
        raise UserError(f"state: must be a dict of arrays by name, not a {type(state).__name__}")
    arrays = {name: _storable(name, value) for name, value in state.items()}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename replaces a file in one step only within a file system.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        safetensors.numpy.save_file(arrays, temporary)
        # Only the owner may read a temporary file. The finished one gets the rights of any new file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {one_line(error)}") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def require_dtypes(path: str | os.PathLike[str]) -> None:
    """Refuses arrays that NumPy cannot hold. The format's own reader reports a broken header."""
    try:
        header, _ = header_of(path)
        dtypes = {name: str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    for name, dtype in dtypes.items():
        require(dtype in DTYPES, f"{path}: {name}.dtype", dtype, f"must be one of {', '.join(DTYPES)}")


def header_of(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """Returns what the header of a file says of its tensors, unchecked, and where their bytes start."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(size, _LONGEST_HEADER))), 8 + size


def _storable(name: str, value: object) -> np.ndarray:
    if not isinstance(name, str):
        raise UserError(f"state: names must be strings, {name!r} is not")
    try:
        array = np.asarray(value, order="C")
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name}: must be an array of numbers, not a {type(value).__name__}") from None
    known = array.dtype.newbyteorder("=") in DTYPES.values()
    allowed = f"cannot be written; allowed are {', '.join(dtype.name for dtype in DTYPES.values())}"
    require(known, f"{name}.dtype", array.dtype.name, allowed)
    return array


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask
