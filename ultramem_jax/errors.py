"""Defines the error that a user can cause, and the checks that raise it with a helpful message."""

import difflib
import math
import re
from collections.abc import Iterable

_WHOLE_NUMBER = re.compile("[0-9]{1,18}")
"""A pattern of 1 to 18 ASCII digits. Python's `int` and `\\d` also accept the digits of other scripts, and
`int` accepts signs, blanks and underscores. `int` refuses thousands of digits with an error of its own.
Nothing here counts to 10¹⁸."""


class UserError(ValueError):
    """Reports bad input in one line that names the field, the value and what is allowed.

    The command line prints only the message, without a traceback, and exits with status 2.
    """

    def __init__(self, message: object = ""):
        """Makes the message one line: names of files and fields may hold line ends."""
        super().__init__(re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", " ", str(message)))


class LossNotFinite(UserError):
    """Reports a run whose loss is no longer finite. Its checkpoints before that stay."""


class Stopped(Exception):
    """Reports that a signal ended the work early; it is saved, and the same command continues from there.

    The command line prints the message and exits with `STATUS`. So scripts can tell this case from finished
    work (0) and from a failure.
    """

    STATUS = 75
    """Exit status EX_TEMPFAIL of sysexits.h."""


def one_line(error: BaseException) -> str:
    """Returns the message of an error with single spaces, and without line ends."""
    return " ".join(str(error).split())


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises `UserError` "field = value: allowed" unless `condition` holds."""
    if not condition:
        raise UserError(f"{field} = {_shown(value)}: {allowed}")


def _shown(value: object) -> str:
    """Returns the value on one line, for a message."""
    try:
        return " ".join(repr(value).split())  # the `repr` of an array has several lines
    except ValueError:  # an integer with more digits than Python prints
        return "a number of thousands of digits"


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for a name that is not in `known`; its message suggests the nearest known name."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {name!r}: {hint}known are {', '.join(known)}")


def whole_number(text: str) -> int | None:
    """Returns the number that 1 to 18 ASCII digits write, or None for any other text."""
    return int(text) if _WHOLE_NUMBER.fullmatch(text) else None


def choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises the error of `unknown` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise unknown(field, value, allowed)


def at_least(low: float, **fields: float) -> None:
    """Raises `UserError` unless all fields are finite and at least `low`; `a__b=x` means the field a.b."""
    for name, value in fields.items():
        allowed = f"must be at least {low}" + (" and finite" if value == math.inf else "")
        require(low <= value < math.inf, name.replace("__", "."), value, allowed)


def guards_a_denominator(field: str, value: float) -> None:
    """Raises `UserError` unless the value, which keeps a denominator from zero, is in [1e-30, 1]."""
    require(1e-30 <= value <= 1, field, value, "must be in [1e-30, 1]")


def fraction(**fields: float) -> None:
    """Raises `UserError` unless every field, named as for `at_least`, is in [0, 1), also as float32."""
    for name, value in fields.items():
        # The largest float32 below 1 is 1 - 2⁻²⁴. A value of at least 1 - 2⁻²⁵, the middle between them,
        # rounds to 1, and Adam divides by 1 - b1.
        rounded = ", also as float32" if 0 <= value < 1 else ""
        require(0 <= value < 1 - 2**-25, name.replace("__", "."), value, f"must be in [0, 1){rounded}")
