"""Opens and writes the folder of a model in Hugging Face's form: `config.json` and `.safetensors` files."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ultramem_jax.errors import UserError, require
from ultramem_jax.files import is_new_or_empty
from ultramem_jax.interop.safetensors_files import DTYPES
from ultramem_jax.interop.safetensors_stream import (
    TensorInFile,
    TensorToWrite,
    shards,
    tensors_in,
    write_tensors,
)
from ultramem_jax.tree_types import JsonDict

CONFIG = "config.json"
_ONE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class FolderTensors:
    """Gives the tensors of a folder; see `StoredTensors`."""

    def __init__(self, folder: Path):
        """Reads the headers of the folder's files.

        Raises:
            UserError: there are none, one is missing or broken, or the index and the files differ.
        """
        self.where = str(folder)
        self._tensors = _indexed(folder) if (folder / _INDEX).exists() else _of_one_file(folder)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: one.shape for name, one in self._tensors.items()}

    def dtype(self, name: str) -> str:
        """Returns the name of a tensor's dtype."""
        return DTYPES[self._tensors[name].dtype].name

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor; see `StoredTensors.read`."""
        return self._tensors[name].read()


def read_json(path: Path) -> JsonDict:
    """Returns the dict that a JSON file holds.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a dict, not a {type(found).__name__}")
    return found


def _of_one_file(folder: Path) -> dict[str, TensorInFile]:
    if (folder / _ONE).exists():
        return tensors_in(folder / _ONE)
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(there) == 1:
        return tensors_in(folder / there[0])
    has = f"has {', '.join(there)}" if there else "has no .safetensors file"
    raise UserError(f"{folder}: must hold {_ONE}, or {_INDEX} and the files that it lists; it {has}")


def _indexed(folder: Path) -> dict[str, TensorInFile]:
    path = folder / _INDEX
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path}: weight_map must be a dict of file names by tensor")
    outside = next((file for file in files.values() if Path(file).name != file), None)
    require(outside is None, f"{path}: weight_map", outside, "must name files of this folder")
    found = {file: tensors_in(folder / file) for file in sorted(set(files.values()))}
    for name, file in files.items():
        require(name in found[file], f"{path}: weight_map[{name!r}]", file, "must hold that tensor")
    extra = sorted(set().union(*found.values()) - files.keys())
    require(not extra, f"{path}: weight_map lacks", extra[:1], "must list all tensors of its files")
    return {name: found[file][name] for name, file in files.items()}


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which gets its name when the block ends without an error.

    Args:
        folder: must not exist yet, or be empty.

    Raises:
        UserError: the folder has something in it, or cannot be written.
    """
    try:
        require(
            is_new_or_empty(folder), "folder", str(folder), "must be new or empty: nothing is overwritten"
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


def write_folder(
    folder: Path, config: JsonDict, tensors: Mapping[str, TensorToWrite], shard_bytes: int
) -> None:
    """Writes a model into a folder.

    Args:
        folder: a folder of the caller's own (`new_folder`).
        config: contents of `config.json`.
        tensors: tensors by name.
        shard_bytes: most bytes of a file.

    Raises:
        OSError: the system refuses.
    """
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": "pt"}  # transformers asks for this word, whatever wrote the file
    parts = shards(tensors, shard_bytes)
    if len(parts) == 1:
        write_tensors(folder / _ONE, parts[0], metadata)
        return
    files: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_tensors(folder / name, part, metadata)
        files |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
