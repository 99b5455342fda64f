"""State dicts as `.safetensors` files."""

import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ultramem_jax.errors import UserError

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64")
"""Dtypes of the format that NumPy knows, bfloat16 by ml_dtypes, under their names in the format."""


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by name, with their stored dtypes.

    Raises:
        UserError: the file is missing, cannot be opened, or is broken; or an array has a dtype that NumPy
            does not have (floats of fewer than 16 bits).
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = list(file.keys())
            for name in names:
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    allowed = f"must be one of {', '.join(_DTYPES)}"
                    raise UserError(f"{path}: the dtype of {name!r} is {dtype}: {allowed}")
            return {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a whole .safetensors file: {_one_line(error)}") from None


def write_safetensors(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes the arrays of `state` with their names and dtypes; its folder is made where it is missing.

    The file appears whole or not at all: another of the same name stays until the new one is complete.

    Raises:
        UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename replaces a file in one step only within a file system.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        safetensors.numpy.save_file(arrays, temporary)
        # A temporary file is its owner's alone; the finished one has the rights of any new file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {_one_line(error)}") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
