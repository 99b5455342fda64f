"""Tables in Markdown, aligned so that their source can be read as well. Imports no JAX: `count` is quick."""

import math
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal

import numpy as np


def table(rows: Sequence[Mapping[str, object]], left: Collection[str] | None = None) -> str:
    """Rows as a table.

    Args:
        rows: values by column; columns appear in the order in which rows first name them, absent values and
            None are blank.
        left: columns that are set flush left, all others flush right; None for those that hold anything but
            numbers.

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
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
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
    """All columns, in the order in which rows first name them."""
    return list(dict.fromkeys(name for row in rows for name in row))


def cell(value: object) -> str:
    """A value to read: counts with commas, measurements to four significant digits, a `Decimal` as it is."""
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
    """`value` with `digits` significant digits, written out between 1e-4 and 1e9."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Decimal | np.number | None)


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
