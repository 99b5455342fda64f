"""Makes the folders that results are written to."""

import os
import pathlib

from ultramem_jax.errors import UserError


def make_folder(path: str | os.PathLike[str], flag: str) -> pathlib.Path:
    """Makes the folder of results, and its parents, and returns its path.

    Callers make it before they measure or compile anything, so that a wrong path is reported at once.

    Args:
        path: the folder; it may exist.
        flag: name of the flag that gave it, for the error.

    Raises:
        UserError: the folder cannot be made; names `flag`.
    """
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} = {str(folder)!r}: cannot be made a folder, {error.strerror}") from error
    return folder
