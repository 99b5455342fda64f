"""Reports in one line what the system refused: a full disk, missing permissions, a path that is too long."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ultramem_jax.errors import UserError

_STATUS = re.compile(r"([A-Z_]+): ")
"""TensorStore begins an error with this status."""
_OS_ERROR_CODE = re.compile(r"\[os_error_code='(\d+)'")
"""TensorStore gives the system's error number in this form, where there is one."""


@contextlib.contextmanager
def refusals_in_a_line(path: Path) -> Iterator[None]:
    """Turns what the system refuses within the block (`OSError`) into one line: the path and the reason.

    Args:
        path: named where the error names no file of its own.

    Raises:
        UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from error


def refusal(error: Exception) -> tuple[int, str] | None:
    """Returns number and reason of what the system refused to a save.

    It returns None if something else failed.

    Args:
        error: an `OSError`, or the `ValueError` that Orbax and TensorStore make of one.
    """
    if isinstance(error, OSError):
        named = f" ({error.filename})" if error.filename else ""
        return error.errno or errno.EIO, f"{error.strerror or error}{named}"
    status, code = _STATUS.match(str(error)), _OS_ERROR_CODE.search(str(error))
    if code is not None:
        return int(code[1]), os.strerror(int(code[1]))
    return (errno.EIO, status[1].replace("_", " ").lower()) if status is not None else None
