"""Keeps the records from which a report can be made again, as JSON."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator

from ultramem_jax.errors import UserError
from ultramem_jax.files import replace_text
from ultramem_jax.tree_types import JsonDict


def keep_record(path: str | os.PathLike[str], tree: JsonDict) -> pathlib.Path:
    """Writes a record, completely or not at all, and returns its path.

    An existing file stays until the new one is complete.

    Args:
        path: path of the file; folders are made.
        tree: the record; all its numbers are finite.

    Raises:
        UserError: the file cannot be written.
    """
    path = pathlib.Path(path)
    text = json.dumps(tree, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written, {error.strerror}") from error
    return path


@contextlib.contextmanager
def kept_record(path: str | os.PathLike[str], kind: str) -> Iterator[JsonDict]:
    """Yields what a JSON file holds, and turns errors of reading it, here and in the body, into one line.

    Args:
        path: path of the file.
        kind: what the file should hold, for the message: `a plan`.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        yield json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not {kind}, {type(error).__name__}: {error}") from error
