"""Checks that a checkpoint is whole, by the size and a checksum of each of its files, written beside them."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ultramem_jax.errors import UserError
from ultramem_jax.files import replace_text

_MANIFEST = "manifest.json"
_FORMAT = 1
_NOT_IN_MANIFEST = frozenset({_MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"})
"""Files that the manifest leaves out. Orbax writes its two files in a checkpoint's own directory last of all,
and nothing here reads them."""

_CHECKSUM_WHOLE_BYTES = 256 * 2**20
"""Size above which a file is sampled: CRC-32 takes about half a second per GB, and a read of the whole
file."""
_CHECKSUM_BLOCKS, _CHECKSUM_BLOCK_BYTES = 256, 64 * 2**10


def write_manifest(directory: Path) -> None:
    """Writes the sizes and checksums of all files below `directory` into its `manifest.json`."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "crc32": _checksum(path)}
        for path in _files(directory)
    }
    replace_text(directory / _MANIFEST, json.dumps({"format": _FORMAT, "files": files}, indent=1))


def find_damage(directory: Path) -> str | None:
    """Returns in one line what is wrong with the checkpoint at `directory`; None if it matches its manifest.

    For a file above 256 MiB it checks the size and 256 blocks of 64 KiB, so that tables of many GB open at
    once. This finds what was cut off, left out or never flushed, but not a few bytes that changed in between.
    The chunks of arrays carry no checksum of their own.

    Raises:
        UserError: the manifest has an unknown format.
    """
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{_MANIFEST} cannot be read ({type(error).__name__})"
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        return f"{_MANIFEST} has no format"
    if manifest["format"] != _FORMAT:
        # The checkpoint may well be whole: a run must not resume from an older one and delete it.
        raise UserError(
            f"{directory / _MANIFEST} has the format {manifest['format']}, known is {_FORMAT}: another "
            "version of this program wrote it"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return f"{_MANIFEST} lists no files"
    for name, expected in files.items():
        path = directory / name
        if not isinstance(expected, dict):
            return f"{_MANIFEST} has no size and checksum of {name}"
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected.get("bytes"):
            return f"{name} has {size} bytes instead of {expected.get('bytes')}"
        if _checksum(path) != expected.get("crc32"):
            return f"{name} has other content than was written"
    return None


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        own = path.parent == directory and path.name in _NOT_IN_MANIFEST
        if path.is_file() and not own:
            yield path


def _checksum(path: Path) -> int:
    """Returns the CRC-32 of a file.

    A large file is sampled in evenly spaced blocks, its first and last bytes included.
    """
    size, checksum = path.stat().st_size, 0
    if size <= _CHECKSUM_WHOLE_BYTES:
        starts: Sequence[int] = range(0, size, _CHECKSUM_BLOCK_BYTES)
    else:
        last = size - _CHECKSUM_BLOCK_BYTES
        starts = [last * block // (_CHECKSUM_BLOCKS - 1) for block in range(_CHECKSUM_BLOCKS)]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            checksum = zlib.crc32(file.read(_CHECKSUM_BLOCK_BYTES), checksum)
    return checksum
