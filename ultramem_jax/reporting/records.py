"""Reads the records from which a report can be made again."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator

from ultramem_jax.errors import UserError
from ultramem_jax.tree_types import JsonDict


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
