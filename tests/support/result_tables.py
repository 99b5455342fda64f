"""Reads tables of Markdown and files of CSV, for tests that compare printed numbers with measured ones."""

import csv
import pathlib
import re
from dataclasses import dataclass

# Not a digit of a word, such as float32, and no part of a longer number.
_NUMBER = re.compile(r"(?<![\w.,-])-?\d[\d,]*(?:\.\d+)?(?![\d,]*\.\d)(?:\s?([kMG])\b)?")
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Printed:
    """Holds a number as a text prints it."""

    text: str
    value: float
    """With its unit: 1.00 M is a million."""
    last_digit: float
    """Value of one more in the last printed digit."""

    def rounds(self, measured: float) -> bool:
        """Returns whether a measured value, rounded to the printed digits, is this number."""
        return abs(measured - self.value) <= (0.5 + 1e-6) * self.last_digit


def printed_numbers(text: str) -> list[Printed]:
    """Returns the numbers of a text in its order, without those in code, in targets of links and in words."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    found = []
    for match in _NUMBER.finditer(plain):
        digits = match[0].removesuffix(match[1] or "").strip().rstrip(",").replace(",", "")
        unit = _UNITS[match[1] or ""]
        decimals = len(digits.partition(".")[2])
        found.append(Printed(match[0], float(digits) * unit, 10.0**-decimals * unit))
    return found


@dataclass(frozen=True)
class MarkdownTable:
    """Holds a table of a document, cells without the blanks around them."""

    heading: str
    """Heading of its section; blank before the first one."""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def has_numbers(self) -> bool:
        """Returns whether a cell that is no label and not the paper's has a number."""
        columns = [i for i, name in enumerate(self.header) if i and "paper" not in name]
        return any(printed_numbers(row[i]) for row in self.rows for i in columns)


def markdown_tables(document: pathlib.Path) -> list[MarkdownTable]:
    """Returns the tables of a document in its order."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heading, tables, lines = "", [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append(tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]))
            continue
        if lines:
            tables.append(MarkdownTable(heading, lines[0], tuple(lines[2:])))
            lines = []
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
    return tables


def csv_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file by column."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def csv_row(path: pathlib.Path, **wanted: object) -> dict[str, str]:
    """Returns the one row of a CSV file that has these values in these columns."""
    rows = [row for row in csv_rows(path) if all(row[name] == str(value) for name, value in wanted.items())]
    assert len(rows) == 1, f"{path.name}: {len(rows)} rows have {wanted}"
    return rows[0]


def number(cell: str) -> float | None:
    """Returns the number of a field; None if it is blank or holds words."""
    try:
        return float(cell)
    except ValueError:
        return None


def csv_numbers(path: pathlib.Path) -> list[float]:
    """Returns all numbers of a CSV file."""
    found = (number(cell) for row in csv_rows(path) for cell in row.values())
    return [value for value in found if value is not None]
