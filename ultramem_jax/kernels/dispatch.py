"""Chooses between a native kernel and the JAX function that computes the same."""

from collections.abc import Callable
from typing import TypeVar

import jax

from ultramem_jax.kernels import native
from ultramem_jax.platforms import platform
from ultramem_jax.tree_types import ArrayTree

Result = TypeVar("Result")
"""A pytree of arrays."""


def native_or(
    otherwise: Callable[..., Result], kernel: Callable[..., Result], serves: bool, *arguments: ArrayTree
) -> Result:
    """Computes `kernel(*arguments)` in a program for CPU, and `otherwise(*arguments)` elsewhere.

    Its derivatives are those of `otherwise`, also where the kernel computes. Neither function may close over
    arrays that are being traced: they are given as arguments.

    Args:
        otherwise: the JAX function, which computes the same on every backend.
        kernel: a function that calls a kernel of `calls`.
        serves: whether the kernel serves these shapes and dtypes.
        *arguments: pytrees of arrays.
    """
    if not serves or platform() != "cpu" or not native.is_on():
        return otherwise(*arguments)

    @jax.custom_jvp
    def either(*arguments: ArrayTree) -> Result:
        # Both are traced, and the compiler gets one of them. So a program can also be compiled for a backend
        # that this process does not have.
        return jax.lax.platform_dependent(*arguments, cpu=kernel, default=otherwise)

    @either.defjvp
    def with_derivative(
        arguments: tuple[ArrayTree, ...], tangents: tuple[ArrayTree, ...]
    ) -> tuple[Result, ArrayTree]:
        return either(*arguments), jax.jvp(otherwise, arguments, tangents)[1]

    result: Result = either(*arguments)
    return result
