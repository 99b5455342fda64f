"""Names the cache folder, writes files that appear whole or not at all, and locks."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Returns the folder of what can be made again: $ULTRAMEM_CACHE, else ~/.cache/ultramem_jax."""
    path = os.environ.get("ULTRAMEM_CACHE", "")
    return Path(path).expanduser() if path else Path.home() / ".cache" / "ultramem_jax"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which then replaces a file atomically, unless an error occurs.

    If the process ends, the old file or the new one is there. The caller must ensure that there is only one
    writer at a time.

    Raises:
        OSError: the system refuses; the error names the file, also when the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replaces a file by a text in UTF-8; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def is_new_or_empty(folder: Path) -> bool:
    """Tells whether a folder can be made at a path, or is there and has nothing in it."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def sync_folder(folder: Path) -> None:
    """Waits until a folder and the files in it are on disk, so that a rename cannot come before its contents.

    Folders within it are not synced.

    Raises:
        OSError: the system refuses.
    """
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file, which is made with its folder.

    The system frees the lock when the process ends.

    Raises:
        OSError: the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # to close the file would not be enough if this process has been forked meanwhile
            fcntl.flock(file, fcntl.LOCK_UN)
