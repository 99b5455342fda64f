"""Reads the tensors of an OLMo checkpoint from its `.safetensors` files, one by one."""

import base64
import io
import pathlib
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from ultramem_jax.errors import UserError, require
from ultramem_jax.interop.safetensors_stream import TensorInFile, tensors_in

MODEL_FILE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
_WRAPPERS = ("_fsdp_wrapped_module.",)
"""Parts of names that come from how a model was trained."""
_ANY_TENSOR = "transformer.wte.weight"
"""Name that every model has. A file that has it keeps names as they are."""
_CONVERT = (
    'convert it where PyTorch is: python -c "import torch, safetensors.torch as s; s.save_file(torch.load('
    "'model.pt', map_location='cpu', weights_only=True), 'model.safetensors')\""
)


class OlmoTensors:
    """Holds the tensors of one or several files. Tensors of the same name are columns of one tensor.

    The first file holds all tensors. The others, of the other ranks, are read only for the tables.
    """

    def __init__(self, files: Sequence[tuple[str, dict[str, TensorInFile]]]):
        self._files = files
        self.where = files[0][0]
        """Path of the first file, for messages."""

    @property
    def names(self) -> list[str]:
        """Returns the names of the tensors in the first file."""
        return list(self._files[0][1])

    def check(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], parts: int = 1) -> None:
        """Raises `UserError` unless each of the first `parts` files has the tensor as it must be.

        Args:
            name: name of the tensor.
            shape: shape of the whole tensor; its last axis is divided over the files.
            dtypes: allowed dtypes, as the format names them.
            parts: number of files that hold columns of the tensor.
        """
        expected = (*shape[:-1], shape[-1] // parts)
        for path, tensors in self._files[:parts]:
            if name not in tensors:
                raise UserError(f"{path} has no {name!r}")
            found, dtype = tensors[name].shape, tensors[name].dtype
            require(found == expected, f"{path}: {name}.shape", found, f"must be {expected}")
            require(dtype in dtypes, f"{path}: {name}.dtype", dtype, f"must be one of {', '.join(dtypes)}")

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a tensor in the first file, or None if it is not there."""
        tensors = self._files[0][1]
        return tensors[name].shape if name in tensors else None

    def read(self, name: str, parts: int = 1) -> np.ndarray:
        """Returns a tensor that passed `check`, in host memory of its own.

        Its dtype is the stored one, or float32 for floats of 64 bits.

        Raises:
            UserError: a number is not finite, or not in float32; the file cannot be read.
        """
        arrays = (_finite(f"{path}: {name}", tensors[name].read()) for path, tensors in self._files[:parts])
        first = next(arrays)
        if parts == 1:
            return first
        width = first.shape[-1]
        whole = np.empty((*first.shape[:-1], parts * width), first.dtype)
        whole[..., :width] = first
        for i, array in enumerate(arrays, start=1):
            whole[..., i * width : (i + 1) * width] = array
        return whole


def _finite(field: str, array: np.ndarray) -> np.ndarray:
    """Returns a tensor, in float32 if it has 64 bits; refuses floats that are not finite."""
    if np.issubdtype(array.dtype, np.integer):
        return array
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32) if array.dtype == np.float64 else array
    bad = numbers.size - np.count_nonzero(np.isfinite(numbers))
    allowed = f"must be finite and in float32, {bad:,} of {numbers.size:,} numbers are not"
    require(bad == 0, field, numbers[~np.isfinite(numbers)][:1].tolist(), allowed)
    return numbers


def open_tensors(folder: pathlib.Path, parts: int) -> OlmoTensors:
    """Reads the headers of the files of a checkpoint.

    Args:
        folder: folder of the checkpoint.
        parts: number of ranks with a file of their own, `rank_0` and so on; 1 is a single file in the folder.

    Raises:
        UserError: a file is missing or broken, or has names that cannot be decoded.
    """
    folders = [folder] if parts == 1 else [folder / f"rank_{rank}" for rank in range(parts)]
    return OlmoTensors([(str(one / MODEL_FILE), _tensors(one)) for one in folders])


def _tensors(folder: pathlib.Path) -> dict[str, TensorInFile]:
    """Returns the tensors of the file in a folder, by their names in the state dict."""
    path = folder / MODEL_FILE
    if not path.is_file():
        if (folder / "model.pt").exists():
            raise UserError(f"{folder / 'model.pt'}: a pickle, which may run code; {_CONVERT}")
        sharded = "; unshard it with the authors' scripts/unshard.py"
        hint = sharded if any((folder / name).exists() for name in ("model", "model_and_optim")) else ""
        raise UserError(f"{path}: no such file{hint}")
    stored = tensors_in(path)
    return {name: stored[key] for name, key in _names(str(path), list(stored)).items()}


def _names(path: str, keys: Sequence[str]) -> dict[str, str]:
    """Returns the key in the file of every tensor, by its name in the state dict.

    The authors' `safetensors_util.py` writes keys as the base64 of a pickled (tuple of names, bool).

    Raises:
        UserError: a key is neither a plain name nor written in this way; two keys have the same name.
    """
    plain = any(_ANY_TENSOR in _without_wrappers(key) for key in keys)
    found: dict[str, str] = {}
    for key in keys:
        name = _without_wrappers(key if plain else _decoded(path, key))
        require(name not in found, f"{path}: tensor", name, "occurs twice")
        found[name] = key
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Loads tuples, strings and booleans. It refuses classes and functions, so no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in a key")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference in a key")


def _decoded(path: str, key: str) -> str:
    try:
        decoded = _PlainUnpickler(io.BytesIO(base64.urlsafe_b64decode(key))).load()
        (name,), is_pickled = decoded
    except Exception:  # a damaged pickle raises errors of many kinds
        name, is_pickled = None, True
    if not isinstance(name, str) or is_pickled is not False:
        raise UserError(f"{path}: {key[:80]!r} is not the name of a tensor, plain or in OLMo's encoding")
    return name


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
