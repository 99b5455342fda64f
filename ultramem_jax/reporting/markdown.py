"""Writes tables in Markdown, aligned so that their source is readable too.

This module imports no JAX, so that `count` starts quickly.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from typing import TypeAlias

import numpy as np

Row: TypeAlias = dict[str, object]
"""A row of a table: values by column, in the order of the columns."""


def table(rows: Sequence[Mapping[str, object]], left: Collection[str] | None = None) -> str:
    """Returns rows as a table in Markdown.

    Args:
        rows: values by column. Columns appear in the order in which rows first name them. Absent values and
            None are blank.
        left: columns that are aligned left; all others are aligned right. None aligns left the columns that
            hold anything but numbers.

    Returns:
        Lines without a line break at the end; `(no rows)` for none.
    """
    names = columns(rows)
    if not names:
        return "(no rows)"
    if left is None:
        left = [name for name in names if not all(_is_number(row.get(name)) for row in rows)]
    cells = [[_escaped(name) for name in names]]
    cells += [[_escaped(cell(row.get(name))) for name in names] for row in rows]
    # The rule below a column needs a hyphen and a colon: readers of Markdown take a bare colon for text.
    widths = [max(2, *(len(line[i]) for line in cells)) for i in range(len(names))]
    flush_left = [name in left for name in names]
    rule = [
        ":" + "-" * (w - 1) if at_left else "-" * (w - 1) + ":"
        for w, at_left in zip(widths, flush_left, strict=True)
    ]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.ljust(width) if at_left else text.rjust(width)
            for text, width, at_left in zip(texts, widths, flush_left, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(texts) for texts in [cells[0], rule, *cells[1:]])


def columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Returns the names of all columns, in the order in which rows first name them."""
    return list(dict.fromkeys(name for row in rows for name in row))


def cell(value: object) -> str:
    """Formats a value for readers.

    Counts have commas, measurements four significant digits, and a `Decimal` all of its digits. None is
    blank.
    """
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return significant(float(value), 4)
    return str(value)


def significant(value: float, digits: int) -> str:
    """Formats `value` with `digits` significant digits, without an exponent between 1e-4 and 1e9."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def interval(low: float, high: float) -> str:
    """Formats a range of measurements with four significant digits, such as `1.234–5.678`."""
    return f"{significant(low, 4)}–{significant(high, 4)}"


def listing(values: Mapping[str, str]) -> str:
    """Returns a list with a line per value, such as those of `describe_environment`."""
    return "\n".join(f"- {name}: `{value}`" for name, value in values.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Decimal | np.number | None)


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
