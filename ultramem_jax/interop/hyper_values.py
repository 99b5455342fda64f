"""Reads single hyper-parameters, with errors that name them."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ultramem_jax.errors import UserError, require

T = TypeVar("T")

Hyper: TypeAlias = Mapping[str, Any]
"""The authors' hyper-parameters by name: numbers, strings, booleans, lists and dicts, unchecked."""

_MOST = 2**31 - 1
"""Bounds sizes, because addresses are int32."""


def of_hyper(make: Callable[[], T]) -> T:
    """Returns what `make` returns. Its errors name this project's fields, and say where the values came from.

    Raises:
        UserError: `make` raises one.
    """
    try:
        return make()
    except UserError as error:
        raise UserError(f"hyper amounts to {error}") from None


def value(hyper: Hyper, name: str) -> Any:
    """Returns a hyper-parameter that the layer requires.

    Raises:
        UserError: it is missing.
    """
    if name not in hyper:
        raise UserError(f"hyper has no {name!r}, which the layer {hyper.get('layer')!r} needs")
    return hyper[name]


def integer(hyper: Hyper, name: str, low: int = 1, high: int = _MOST, why: str | None = None) -> int:
    """Returns an integer in [low, high].

    Raises:
        UserError: it is missing, or not such an integer.
    """
    found = value(hyper, name)
    whole = isinstance(found, int | np.integer) and not isinstance(found, bool) and low <= found <= high
    why = why or ("sizes are int32" if high == _MOST else "each has arrays of its own in the state dict")
    require(
        bool(whole), f"hyper.{name}", found, f"must be an integer of at least {low}, at most {high}: {why}"
    )
    return int(found)


def number(hyper: Hyper, name: str, path: str = "") -> float:
    """Returns a finite number of at least 0. `path` is where it is within the hyper-parameters.

    Raises:
        UserError: it is missing, or not such a number.
    """
    found = value(hyper, name)
    right = (
        isinstance(found, int | float | np.integer | np.floating)
        and not isinstance(found, bool)
        and 0 <= found <= sys.float_info.max
    )
    require(bool(right), f"hyper.{path}{name}", found, "must be a number of at least 0, and finite")
    return float(found)


def switch(hyper: Hyper, name: str) -> bool:
    """Returns a boolean.

    Raises:
        UserError: it is missing, or not a boolean.
    """
    found = value(hyper, name)
    require(isinstance(found, bool), f"hyper.{name}", found, "must be true or false")
    return bool(found)
