"""Describes the axes of a mesh of devices, and computes functions of tokens where the tokens are.

The compiler splits dense layers over devices by itself. It cannot split a loop over chunks of tokens, a sort,
or a lookup in a table that is split: without help, it would first give every device all tokens. Such
functions run under `jax.shard_map`, each device on its own tokens. While they are traced, they get the mesh
from `current_axes()`. Outside of `on_mesh`, or on one device, they are the plain functions.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ultramem_jax.config.exchange_purposes import GRADIENTS_OF_PARAMETERS
from ultramem_jax.config.exchange_shapes import AxisRoles
from ultramem_jax.ops.exchanges import named_exchange
from ultramem_jax.tree_types import ArrayTree

Result = TypeVar("Result")
"""A pytree of arrays."""
Sums = TypeVar("Sums")
"""A pytree of arrays that are sums over tokens."""


@dataclass(frozen=True)
class MeshAxes(AxisRoles):
    """Names a mesh's axes that split tokens, tables and experts; axes of size 1 are left out."""

    mesh: Mesh
    """The mesh of devices."""
    tokens: tuple[str, ...] = ()
    """Mesh axes that split sequences or tokens, major to minor; those of `owners` come last."""
    slots: tuple[str, ...] = ()
    """Mesh axes that split the rows of a table."""
    width: tuple[str, ...] = ()
    """Mesh axes that split the columns of a table."""
    experts: tuple[str, ...] = ()
    """Mesh axes that split the experts of a Mixture of Experts."""

    def size(self, axes: tuple[str, ...]) -> int:
        """Returns the number of devices along these axes, counted as one axis."""
        return math.prod(self.mesh.shape[name] for name in axes)

    @property
    def table(self) -> P:
        """Returns the partition spec of a table (N, d)."""
        return P(self.slots, self.width)

    def sharding(self, spec: P | None = None) -> NamedSharding:
        """Returns the sharding of a partition spec on this mesh; None replicates an array on every device."""
        return NamedSharding(self.mesh, P() if spec is None else spec)


_AXES: ContextVar[MeshAxes | None] = ContextVar("axes", default=None)


@contextlib.contextmanager
def on_mesh(axes: MeshAxes | None) -> Iterator[None]:
    """Makes functions that are traced within it compute on that mesh.

    None, or a mesh of one device, makes them plain functions.
    """
    token = _AXES.set(axes if axes is not None and axes.mesh.size > 1 else None)
    try:
        yield
    finally:
        _AXES.reset(token)


def current_axes() -> MeshAxes | None:
    """Returns the axes of the innermost `on_mesh`; None on one device."""
    return _AXES.get()


def island(
    axes: MeshAxes, function: Callable[..., Result], in_specs: ArrayTree, out_specs: ArrayTree
) -> Callable[..., Result]:
    """Returns a function that every device computes on its shards of the arguments.

    The function writes its own collectives. JAX never differentiates through an island: code that has a
    derivative defines it around its islands, so that no collective is added to those that are written.

    Args:
        axes: the mesh.
        function: maps shards of the arguments to shards of the results.
        in_specs: partition specs of the arguments.
        out_specs: partition specs of the results.
    """

    def local(*arguments: ArrayTree) -> Result:
        with on_mesh(None):
            return function(*arguments)

    return jax.shard_map(local, mesh=axes.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def per_token(
    function: Callable[..., Result], tokens: tuple[jax.Array, ...], shared: tuple[jax.Array, ...] = ()
) -> Result:
    """Computes `function(*tokens, *shared)`, each device on its own tokens.

    Args:
        function: returns a tree of arrays (T, ...), for any T. A token's result must depend only on it.
        tokens: (T, ...) each; or (B, ...), if the function is of sequences.
        shared: arrays that every device has whole.
    """
    axes = current_axes()
    if axes is None or not axes.tokens:
        return function(*tokens, *shared)
    of_tokens = P(axes.tokens)
    specs = (of_tokens,) * len(tokens) + (P(),) * len(shared)
    return island(axes, function, specs, of_tokens)(*tokens, *shared)


def per_token_and_sum(
    function: Callable[..., tuple[Result, Sums]],
    tokens: tuple[jax.Array, ...],
    shared: tuple[jax.Array, ...] = (),
) -> tuple[Result, Sums]:
    """Computes `function(*tokens, *shared)`, of which the second result is a sum over tokens.

    The first result is as of `per_token`, the second as of `sum_over_tokens`.

    Args:
        function: returns a tree of arrays (T, ...), and a tree of arrays that are sums over tokens.
        tokens: (T, ...) each.
        shared: arrays that every device has whole.
    """
    axes = current_axes()
    if axes is None or not axes.tokens:
        return function(*tokens, *shared)
    of_tokens = P(axes.tokens)

    def summed(*arguments: jax.Array) -> tuple[Result, Sums]:
        own, sums = function(*arguments)
        with named_exchange(GRADIENTS_OF_PARAMETERS):
            return own, jax.lax.psum(sums, axes.tokens)

    specs = (of_tokens,) * len(tokens) + (P(),) * len(shared)
    return island(axes, summed, specs, (of_tokens, P()))(*tokens, *shared)


def sum_over_tokens(
    function: Callable[..., Result],
    tokens: tuple[jax.Array, ...],
    shared: tuple[jax.Array, ...] = (),
) -> Result:
    """Computes `function(*tokens, *shared)`, a sum over tokens: per device first, then over all devices.

    The result is on every device. This takes an all-reduce of its size, named as that of gradients of
    parameters.

    Args:
        function: returns a tree of arrays, each a sum over tokens.
        tokens: (T, ...) each.
        shared: arrays that every device has whole.
    """

    def with_nothing_else(*arguments: jax.Array) -> tuple[tuple[()], Result]:
        return (), function(*arguments)

    return per_token_and_sum(with_nothing_else, tokens, shared)[1]


def constrain_tokens(x: jax.Array, axis: int = 0) -> jax.Array:
    """Constrains x to be split as tokens are along `axis`, and along no other axis."""
    axes = current_axes()
    if axes is None or not axes.tokens:
        return x
    return jax.lax.with_sharding_constraint(x, axes.sharding(P(*(None,) * axis, axes.tokens)))
