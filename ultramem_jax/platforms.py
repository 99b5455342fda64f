"""Tells for which platform a function is being traced, so that algorithms can be chosen by it."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, TypeAlias, get_args

import jax

Platform: TypeAlias = Literal["cpu", "gpu", "tpu"]
"""Platforms that algorithms are chosen for. Other platforms get the algorithms of a GPU."""

LANES = 128
"""Numbers whose multiple a TPU pads the last axis of an array to."""

_TARGET: ContextVar[Platform | None] = ContextVar("target", default=None)


def platform() -> Platform:
    """Returns the platform of the program that is being traced: that of `targeting`, or the default one."""
    target = _TARGET.get()
    if target is not None:
        return target
    backend = jax.default_backend()
    return next((name for name in get_args(Platform) if name == backend), "gpu")


@contextlib.contextmanager
def targeting(target: Platform | None) -> Iterator[None]:
    """Makes functions that are traced within it, and for the first time, choose algorithms for a platform.

    None leaves the choice as it is.
    """
    token = _TARGET.set(target or _TARGET.get())
    try:
        yield
    finally:
        _TARGET.reset(token)
