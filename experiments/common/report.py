"""Writes what every experiment writes: a table in Markdown and CSV, and where it was measured."""

import csv
import os
import pathlib
from collections.abc import Mapping, Sequence

from ultramem_jax.errors import UserError
from ultramem_jax.reporting import markdown


def write_table(
    rows: Sequence[Mapping[str, object]],
    path_without_suffix: str | os.PathLike[str],
    title: str,
    environment: Mapping[str, str],
    notes: Sequence[str] = (),
    sections: Mapping[str, Sequence[str]] | None = None,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes a table as `.md` (to read, rounded) and `.csv` (to compute with, as given).

    Args:
        rows: values by column; columns appear in the order in which rows first name them, absent values are
            blank.
        path_without_suffix: folders are made.
        title: heading of the Markdown file; name units in it or in the columns.
        environment: of `describe_environment()`.
        notes: paragraphs below the table.
        sections: paragraphs below these, under a heading each.

    Returns:
        The two paths.
    """
    measured = "\n".join(f"- {name}: `{value}`" for name, value in environment.items())
    parts = [f"# {title}", markdown.table(rows), *notes]
    for heading, paragraphs in [*(sections or {}).items(), ("Where this was measured", [measured])]:
        parts += [f"## {heading}", *paragraphs]
    text = _with_suffix(path_without_suffix, ".md")
    text.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    table = _with_suffix(path_without_suffix, ".csv")
    write_csv(rows, table)
    return text, table


def write_csv(rows: Sequence[Mapping[str, object]], path: pathlib.Path) -> None:
    """Writes rows as given; columns and blanks as for `write_table`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, markdown.columns(rows), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make_folder(path: str, flag: str) -> pathlib.Path:
    """The folder of results, made before anything is measured: not to find out in the end that it cannot be.

    Raises:
        UserError: it cannot be made; names `flag`.
    """
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} = {path!r}: cannot be made a folder, {error.strerror}") from error
    return folder


def _with_suffix(path: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    """`path` with a suffix appended (not replaced: a name may have dots), its folder made."""
    path = pathlib.Path(f"{os.fspath(path)}{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
