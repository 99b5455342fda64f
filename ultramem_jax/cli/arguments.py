"""Flags that are read before absl reads the rest: their values come out of the command line by hand."""

from collections.abc import Iterable, Sequence

from ultramem_jax.errors import UserError, require, unknown, whole_number


def take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `--flag=value` or `--flag value`, the last one if there are several, and the rest.

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
    """The same for a whole number, 0 or above."""
    text, rest = take(argv, flag)
    if text is None:
        return None, rest
    number = whole_number(text)
    require(number is not None, f"--{flag}", text, "must be a whole number, 0 or above")
    return number, rest


def check_names(flag: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Checks a flag that lists names.

    Args:
        flag: without its dashes.
        names: what it was given.
        known: what is allowed.

    Raises:
        UserError: no name, or an unknown one.
    """
    known = list(known)
    if not names:
        raise UserError(f"--{flag} = '': name at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown(f"name in --{flag}", name, known)
