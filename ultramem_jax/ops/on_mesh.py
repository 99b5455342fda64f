"""Computation on a mesh of devices: what its axes are for, and functions of tokens computed where they lie.

The compiler splits dense layers over devices by itself. It cannot split a loop over chunks of tokens, a sort,
or a lookup in a table that is in parts: left alone, it would first give every device all tokens. Such
functions run under `jax.shard_map`, each device on its own tokens. Which mesh that is, they learn from
`current_axes()` while they are traced; outside of `on_mesh`, or on one device, they are the plain functions.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ultramem_jax.config.exchange_purposes import GRADIENTS_OF_PARAMETERS
from ultramem_jax.config.exchange_shapes import AxisRoles
from ultramem_jax.ops.exchanges import named_exchange


@dataclass(frozen=True)
class MeshAxes(AxisRoles):
    """A mesh, and which of its axes split tokens, tables and experts. Axes of one device are left out."""

    mesh: Mesh
    tokens: tuple[str, ...] = ()
    """Of every array over sequences or tokens, major to minor; those of `owners` come last."""
    slots: tuple[str, ...] = ()
    """Of the rows of a table."""
    width: tuple[str, ...] = ()
    """Of the columns of a table."""
    experts: tuple[str, ...] = ()
    """Of the experts of a Mixture of Experts."""

    def size(self, axes: tuple[str, ...]) -> int:
        """Devices along these axes, counted as one axis."""
        return math.prod(self.mesh.shape[name] for name in axes)

    @property
    def table(self) -> P:
        """How a table (N, d) lies on the mesh."""
        return P(self.slots, self.width)

    def sharding(self, spec: P | None = None) -> NamedSharding:
        """On this mesh; the same array on every device if no spec is given."""
        return NamedSharding(self.mesh, P() if spec is None else spec)


_AXES: ContextVar[MeshAxes | None] = ContextVar("axes", default=None)


@contextlib.contextmanager
def on_mesh(axes: MeshAxes | None) -> Iterator[None]:
    """Within it functions are traced for that mesh; None, or a mesh of one device, is none."""
    token = _AXES.set(axes if axes is not None and axes.mesh.size > 1 else None)
    try:
        yield
    finally:
        _AXES.reset(token)


def current_axes() -> MeshAxes | None:
    """The axes of the innermost `on_mesh`; None on one device."""
    return _AXES.get()


def island(axes: MeshAxes, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function computed by each device on its parts of the arguments, with its own collectives.

    Nothing differentiates through it: what has a derivative defines one around its islands, so that every
    collective stands where it is written.
    """

    def local(*arguments: Any) -> Any:
        with on_mesh(None):
            return function(*arguments)

    return jax.shard_map(local, mesh=axes.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def per_token(
    function: Callable[..., Any], tokens: tuple[jax.Array, ...], shared: tuple[jax.Array, ...] = ()
) -> Any:
    """`function(*tokens, *shared)`, each device on its own tokens.

    Args:
        function: to a tree of arrays (T, ...), for any T; a token's result depends on that token alone.
        tokens: (T, ...) each.
        shared: on every device.
    """
    axes = current_axes()
    if axes is None or not axes.tokens:
        return function(*tokens, *shared)
    of_tokens = P(axes.tokens)
    specs = (of_tokens,) * len(tokens) + (P(),) * len(shared)
    return island(axes, function, specs, of_tokens)(*tokens, *shared)


def sum_over_tokens(
    function: Callable[..., Any],
    tokens: tuple[jax.Array, ...],
    shared: tuple[jax.Array, ...] = (),
    purpose: str = GRADIENTS_OF_PARAMETERS,
) -> Any:
    """The same for a function to a sum over tokens: each device sums over its own, then all of theirs.

    The result is on every device: an all-reduce of its size, for the purpose that is named.
    """
    axes = current_axes()
    if axes is None or not axes.tokens:
        return function(*tokens, *shared)
    specs = (P(axes.tokens),) * len(tokens) + (P(),) * len(shared)

    def summed(*arguments: jax.Array) -> Any:
        own = function(*arguments)
        with named_exchange(purpose):
            return jax.lax.psum(own, axes.tokens)

    return island(axes, summed, specs, P())(*tokens, *shared)


def constrain_tokens(x: jax.Array, axis: int = 0) -> jax.Array:
    """X, with its axis of sequences or tokens split as tokens are, and the others not at all."""
    axes = current_axes()
    if axes is None or not axes.tokens:
        return x
    return jax.lax.with_sharding_constraint(x, axes.sharding(P(*(None,) * axis, axes.tokens)))
