"""Reads flags that must be known before absl parses the command line, and checks the values of flags."""

from collections.abc import Iterable, Sequence

from ultramem_jax.errors import UserError, require, unknown, whole_number

HELP = ("--help", "-h", "-help")
"""Words that ask for help."""


def take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Returns the value of a flag, and the command line without that flag.

    It reads `--flag=value` and `--flag value`. If the flag is given several times, the last value counts.

    Returns:
        The value, None if the flag is absent; the remaining arguments.

    Raises:
        UserError: a flag without a value.
    """
    value, rest, position = None, [], 0
    while position < len(argv):
        name, equals, given = argv[position].partition("=")
        if name not in (f"--{flag}", f"-{flag}"):
            rest.append(argv[position])
        elif equals:
            value = given
        elif position + 1 < len(argv):
            position += 1
            value = argv[position]
        else:
            raise UserError(f"--{flag}: needs a value, --{flag}=VALUE")
        position += 1
    return value, rest


def take_integer(argv: list[str], flag: str) -> tuple[int | None, list[str]]:
    """Returns the value of a flag as a whole number, 0 or above, and the command line without that flag.

    Returns:
        The value, None if the flag is absent; the remaining arguments.

    Raises:
        UserError: a flag without a value, or a value that is not such a number.
    """
    text, rest = take(argv, flag)
    if text is None:
        return None, rest
    number = whole_number(text)
    require(number is not None, f"--{flag}", text, "must be a whole number, 0 or above")
    return number, rest


def positive_number(flag: str, text: str) -> int:
    """Returns one entry of a flag that lists whole numbers above 0.

    Args:
        flag: name of the flag, without its dashes.
        text: the entry that the user gave.

    Raises:
        UserError: the entry is not such a number.
    """
    number = whole_number(text) or 0
    require(number > 0, flag, text, "must be whole numbers above 0")
    return number


def check_names(flag: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Checks that a flag lists at least one name, and only known ones.

    Args:
        flag: name of the flag, without its dashes.
        names: the names that the user gave.
        known: all names that are allowed.

    Raises:
        UserError: no name, or an unknown one.
    """
    known = list(known)
    if not names:
        raise UserError(f"--{flag} = '': name at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown(f"name in --{flag}", name, known)
