"""Reads and writes files of tensors one tensor at a time, so that a model is never in host memory twice.

The library `safetensors` maps a file into host memory, and keeps what it has read there until the file is
closed; it writes from a copy of all tensors. Here it checks a file's header. The bytes are read and written
by NumPy.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors

from ultramem_jax.errors import UserError, one_line, require
from ultramem_jax.interop.safetensors_files import DTYPES, header_of, require_dtypes


class TensorInFile(NamedTuple):
    """Says where a tensor is."""

    file: Path
    dtype: str
    """Code of the dtype in the format, such as `BF16`."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""

    def read(self) -> np.ndarray:
        """Returns the tensor.

        Raises:
            UserError: the file has become shorter, or cannot be read.
        """
        count = math.prod(self.shape)
        try:
            flat = np.fromfile(self.file, DTYPES[self.dtype], count, offset=self.offset)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {one_line(error)}") from None
        require(flat.size == count, f"{self.file}: elements that can be read", flat.size, f"must be {count}")
        return flat.reshape(self.shape)


def tensors_in(path: Path) -> dict[str, TensorInFile]:
    """Returns the tensors of a `.safetensors` file by name; reads only the header.

    Raises:
        UserError: the file is missing, not a regular one, or not whole.
    """
    if not path.is_file():
        raise UserError(f"{path}: must be a regular file, and there is none")
    require_dtypes(path)
    try:
        with safetensors.safe_open(path, framework="numpy"):  # checks that the header and all bytes are there
            pass
        header, start = header_of(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a whole .safetensors file: {one_line(error)}") from None
    return {
        name: TensorInFile(path, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


class TensorToWrite(NamedTuple):
    """Describes a tensor before it is there."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    """Returns the tensor, of that dtype and shape."""

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str]) -> None:
    """Writes a `.safetensors` file, and makes each tensor only when it is written.

    Args:
        path: the file, which is not replaced atomically: the caller must write into a folder of its own.
        tensors: tensors by name.
        metadata: strings for the header.

    Raises:
        OSError: the system refuses.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        offsets = (end, end := end + tensor.nbytes)
        code = codes[tensor.dtype.newbyteorder("=")]
        header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            array = np.asarray(tensor.make(), order="C")
            assert array.shape == tensor.shape and array.dtype == tensor.dtype
            array.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def shards(tensors: Mapping[str, TensorToWrite], most_bytes: int) -> Sequence[dict[str, TensorToWrite]]:
    """Returns the tensors in groups of at most `most_bytes` each, in their order; a larger one is alone."""
    groups: list[dict[str, TensorToWrite]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > most_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups
