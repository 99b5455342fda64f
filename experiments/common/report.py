"""Writes the results of an experiment: a table in Markdown and CSV, and where it was measured."""

import csv
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from ultramem_jax.reporting import markdown


def write_table(
    rows: Sequence[Mapping[str, object]],
    path_without_suffix: str | os.PathLike[str],
    title: str,
    environment: Mapping[str, str],
    notes: Sequence[str] = (),
    sections: Mapping[str, Sequence[str]] | None = None,
    figures: Mapping[str, str] | None = None,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes a table as `.md` (to read, rounded) and `.csv` (to compute with, unrounded).

    Args:
        rows: values by column. Columns appear in the order in which rows first name them. Absent values are
            blank.
        path_without_suffix: path of both files, without suffix; folders are made.
        title: heading of the Markdown file; name units in it or in the columns.
        environment: strings from `describe_environment()`.
        notes: paragraphs below the table.
        sections: paragraphs below the notes, by heading.
        figures: names of figures in the same folder, by caption; they stand below the table.

    Returns:
        The paths of the Markdown file and of the CSV file.
    """
    measured = markdown.listing(environment)
    shown = [f"![{caption}]({name})" for caption, name in (figures or {}).items()]
    parts = [f"# {title}", markdown.table(rows), *shown, *notes]
    for heading, paragraphs in [*(sections or {}).items(), ("Where this was measured", [measured])]:
        parts += [f"## {heading}", *paragraphs]
    text = _with_suffix(path_without_suffix, ".md")
    text.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    table = _with_suffix(path_without_suffix, ".csv")
    write_csv(rows, table)
    return text, table


def write_csv(rows: Sequence[Mapping[str, object]], path: pathlib.Path) -> None:
    """Writes rows unrounded; columns and blanks are as in `write_table`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, markdown.columns(rows), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def file_stem(name: str, device: str, *, on_cpu: bool) -> str:
    """Returns the name of an experiment's files without suffix; it names the device unless that is a CPU.

    Args:
        name: name of the experiment.
        device: kind of the device, such as `NVIDIA H100 80GB HBM3`.
        on_cpu: whether the device is a CPU.
    """
    suffix = re.sub(r"\W+", "-", device).strip("-").lower()
    return name if on_cpu else f"{name}-{suffix}"


def device_kind(environment: Mapping[str, str]) -> str:
    """Returns the kind of an environment's devices, such as `cpu` or `NVIDIA H100 80GB HBM3`, uncounted."""
    return re.sub(r"^\d+ × | \(\w+\)$", "", environment.get("devices", "unknown device"))


def is_cpu(environment: Mapping[str, str]) -> bool:
    """Tells whether the devices of an environment are CPUs."""
    return environment.get("devices", "").endswith("(cpu)")


def ratio(value: float | None, base: float | None) -> float | None:
    """Returns `value / base`; None if one of them is None or the base is 0."""
    return value / base if value is not None and base else None


def percent(share: float | None, deviation: float | None = None) -> str | None:
    """Returns a share in whole per cent, with its standard deviation if there is one; None for None."""
    if share is None:
        return None
    return f"{100 * share:.0f}{spread(None if deviation is None else 100 * deviation, '.0f')} %"


def spread(deviation: float | None, form: str) -> str:
    """Returns a standard deviation as it stands after a mean; nothing for None."""
    return "" if deviation is None else f" ± {deviation:{form}}"


def _with_suffix(path: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    """Appends a suffix to a path, and makes its folder; a name with dots keeps all of them."""
    path = pathlib.Path(f"{os.fspath(path)}{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
