"""Makes the fields of config dataclasses have the types of their annotations.

Values come from Python code, config files, the command line and JSON. Without this check, a value of a wrong
type would cause an error much later, far from its cause: `steps=2.5` trains three steps, and a NumPy integer
cannot be saved.
"""

import contextlib
import dataclasses
import functools
import numbers
import os
import types
import typing
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np

from ultramem_jax.errors import choice, require

FilePath = Annotated[str, os.PathLike]
"""Type of a field that names a file: a string. Any `os.PathLike`, such as `pathlib.Path`, is converted."""

FieldValue: TypeAlias = bool | int | float | str | tuple[int, ...] | None
"""Value of a config field that is not a config itself."""

Fields: TypeAlias = dict[str, Any]
"""Keyword arguments of a config dataclass, which checks their types itself."""

_PATH: ContextVar[str | None] = ContextVar("path", default=None)


@contextlib.contextmanager
def built_at(path: str) -> Iterator[None]:
    """Makes the errors of configs that are built within it name their fields `path.field`.

    Only the code that builds a whole config knows the path of each part. A part knows only its `PREFIX`.
    """
    token = _PATH.set(path)
    try:
        yield
    finally:
        _PATH.reset(token)


_FLOAT32_MAX = float(np.finfo(np.float32).max)
_EXAMPLES = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


class Checked:
    """Checks every field of a config dataclass against its annotation when an instance is made.

    Config dataclasses are subclasses of it. Whole numbers may have any integer type and become `int`. Numbers
    may be any `numbers.Real` and become `float`, unless they are already an `int`. Only booleans count as
    booleans. Every float must be finite, also as float32, because models compute in float32. Choices are
    annotated as `Literal`. A subclass with further checks calls `super().__post_init__()` before them.
    """

    PREFIX: ClassVar[str] = ""
    """Prefix of a field's name in errors, such as `train.`."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():  # type: ignore[arg-type]
            value = _converted(self.named(name), getattr(self, name), kind)
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def named(self, field: str) -> str:
        """Returns the full name of a field, for an error."""
        path = _PATH.get()
        return f"{path}.{field}" if path else self.PREFIX + field

    def require(self, condition: bool, field: str, allowed: str) -> None:
        """Raises `UserError` about a field unless `condition` holds; the field may be `part.field`."""
        if not condition:
            value = functools.reduce(getattr, field.split("."), self)
            require(False, self.named(field), value, allowed)

    def at_least(self, low: float, *fields: str) -> None:
        """Raises `UserError` unless all the named fields are at least `low`."""
        for field in fields:
            self.require(getattr(self, field) >= low, field, f"must be at least {low}")


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    """Returns the annotation of every field of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _converted(name: str, value: Any, kind: Any) -> Any:
    """Returns the value in the type of its annotation.

    Raises:
        UserError: the annotation does not allow the value.
    """
    if isinstance(kind, types.UnionType):
        (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
        return None if value is None else _converted(name, value, kind)
    if typing.get_origin(kind) is Literal:
        value = _converted(name, value, str)
        choice(name, value, typing.get_args(kind))
        return value
    if typing.get_origin(kind) is tuple:
        (of, _) = typing.get_args(kind)
        whole = isinstance(value, list | tuple)
        require(whole, name, value, f"must be a tuple, each {_EXAMPLES.get(of)}")
        return tuple(_converted(name, one, of) for one in value)
    kind = typing.get_origin(kind) or kind if kind is not FilePath else kind
    if kind is FilePath and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is FilePath:
        kind = str
    accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    require(right, name, value, f"must be {_EXAMPLES.get(kind) or f'of the type {kind.__name__}'}")
    if kind is int:
        value = int(value)
        require(abs(value) < 2**32, name, value, "must be below 2**32: nothing here has more bits")
    if kind is float:
        try:
            # A whole number stays an `int`, so that messages show what the user wrote.
            value = value if type(value) is int else float(value)
            finite = abs(value) <= _FLOAT32_MAX
        except OverflowError:  # a fraction
            finite = False
        require(finite, name, value, "must be a finite number, also as float32")
    # A member of an enumeration of strings becomes its value.
    return str.__str__(value) if kind is str else value
