"""Finds and reads text files of this machine. It opens only regular files."""

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from ultramem_jax.errors import UserError

_SNIFFED_BYTES = 8192
"""Number of first bytes that are examined. A file with a zero byte among them is not text, as in git."""
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""First bytes of UTF-16 and, followed by zeros, of UTF-32. No text in UTF-8 begins with them."""
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"PK\x03\x04", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
"""First bytes of files of gzip, bzip2, zip, xz and Zstandard."""


def is_regular(path: str | Path) -> bool:
    """Returns whether a path leads to a regular file, also through symbolic links.

    Reading anything else may never end: a pipe waits for a writer, and /dev/zero has no last byte.
    """
    return os.path.isfile(path)


def regular_files(root: Path) -> Iterator[Path]:
    """Yields the regular files below a folder, except hidden ones and those in hidden folders.

    Links to files count. Links to folders do not, because they may lead back.

    Raises:
        UserError: a folder below cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise _cannot_read(error.filename, error) from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        yield from filter(is_regular, files)


def read(path: Path) -> bytes:
    """Returns the bytes of a regular file, decompressed if its name ends in .gz.

    Raises:
        UserError: it is unreadable, cut off or damaged.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise _cannot_read(path, error) from error


def other_than_text(path: Path) -> str | None:
    """Returns what a regular file seems to be if it is not text, to follow "it is"; None for text.

    Text is not empty, has no zero byte near its beginning, and does not begin as UTF-16. For a .gz file, the
    contents decide.

    Raises:
        UserError: it is unreadable, cut off or damaged.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            head = file.read(_SNIFFED_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise _cannot_read(path, error) from error
    if not head:
        return "empty"
    if b"\0" not in head and not head.startswith(_BYTE_ORDER_MARKS):
        return None
    if head.startswith(_COMPRESSED):
        return "compressed: decompress it, or give a gzip file a name that ends in .gz"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it and name the folder"
    # In UTF-16, one of the two bytes of most characters is zero, always on the same side.
    one_sided = len(head) % 2 == 0 and (0 in head[::2]) != (0 in head[1::2])
    mostly = one_sided and head.count(0) > len(head) // 4
    if mostly or head.startswith((*_BYTE_ORDER_MARKS, b"\0\0\xfe\xff")):
        return "likely UTF-16 or UTF-32: convert it to UTF-8, without zero bytes"
    return f"binary: it has a zero byte among its first {_SNIFFED_BYTES:,}"


def _cannot_read(path: str | Path, error: Exception) -> UserError:
    return UserError(f"data.path: cannot read {str(path)!r}: {error}")
