"""Flags that are read before absl reads the rest: their values come out of the command line by hand."""

from ultramem_jax.errors import UserError, require, whole_number


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
