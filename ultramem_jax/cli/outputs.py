"""Checks where a command is to write, before its work begins."""

import os
from pathlib import Path

from ultramem_jax.errors import require
from ultramem_jax.files import is_new_or_empty


def output_file(flag: str, path: str | Path) -> Path:
    """Returns the file that a command is to write, with `~` expanded.

    Args:
        flag: the flag that names it, with its dashes.
        path: its value.

    Raises:
        UserError: it is a folder, or its folder does not exist or cannot be written to.
    """
    file = Path(path).expanduser()
    fits = file.parent.is_dir() and os.access(file.parent, os.W_OK) and not file.is_dir()
    require(fits, flag, str(file), "must be a file in a folder that exists and can be written to")
    return file


def output_folder(flag: str, path: str | Path) -> Path:
    """Returns the folder that a command is to make, with `~` expanded. Its parents need not exist.

    Args:
        flag: the flag that names it, with its dashes.
        path: its value.

    Raises:
        UserError: it has something in it, is no folder, or cannot be made.
    """
    folder = Path(path).expanduser()
    require(is_new_or_empty(folder), flag, str(folder), "must be a new or an empty folder")
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    require(there.is_dir() and os.access(there, os.W_OK), flag, str(folder), f"{there} cannot be written to")
    return folder
