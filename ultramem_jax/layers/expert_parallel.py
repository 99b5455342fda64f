"""Computes a Mixture of Experts on a mesh: every device routes its own tokens, owners compute their experts.

Experts are split over the P devices of a group along `MeshAxes.experts`. Each device owns X/P consecutive
experts. Of the T·k assignments of its own T tokens, a device sends up to C to every owner, in one all-to-all
of rows (P·C, D). Owners compute their experts on the rows that they received. A second all-to-all returns the
results, and gates are applied where the tokens are. Assignments beyond C go through further, smaller rounds
of the same exchange. The busiest pair of the group decides how many, which is known only at run time. Nothing
is dropped at any imbalance.

In a layer, each device sends these bytes to others, and receives as many; b is the number of bytes per value
of `ModelConfig.dtype`:

- forward 2·(P−1)·C·D·b, and 4·X·(P−1)/P for the loads, which tell an owner the expert of every row;
- backward 2·(P−1)·C·D·b: the derivatives of the results go to the owners, those of the rows come back;
- in a further round of C' = ⌈C/4⌉ rows per pair, forward 2·(P−1)·C'·D·b; backward 4·(P−1)·C'·D·b, because it
  computes the round again.

Weights do not travel along the axis that splits them. Their gradients are all-reduced over the axes that
split tokens and not experts: 4 bytes for each weight of the device's own X/P experts.

Experts that are not split are on every device, which computes them for its own tokens. If devices along the
axis of the experts have the same tokens (`MeshConfig.batch_over_memory` off), nothing is exchanged: each
owner adds its experts' share. Outputs are then partial sums over that axis. They are also partial sums over
`tensor`, which splits the inner width of each expert. This takes all-reduces of T·D·b bytes forward, and of
T·D·b and 4·T·k (the gates) backward.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import exchange_purposes as purposes
from ultramem_jax.config.exchange_shapes import exchange_capacity, overflow_capacity
from ultramem_jax.layers.experts import (
    Dispatch,
    ExpertWeights,
    block_shape,
    combine,
    compute_experts,
    dispatch_plan,
    spread,
    window,
)
from ultramem_jax.ops.exchanges import named_exchange
from ultramem_jax.ops.on_mesh import MeshAxes, island
from ultramem_jax.tree_types import ArrayTree

_Gradients = tuple[jax.Array, jax.Array, ExpertWeights]
"""Derivatives by x, gates and weights."""
_Residuals = tuple[ArrayTree, jax.Array, jax.Array, ExpertWeights]
"""Values that the devices keep, then x, gates and weights."""


def experts_on_mesh(
    axes: MeshAxes,
    implementation: str,
    x: jax.Array,
    gates: jax.Array,
    weights: ExpertWeights,
    experts: jax.Array,
) -> jax.Array:
    """Sums gate·expert(x) over a token's k experts, on a mesh; differentiable once, in reverse.

    Args:
        axes: the mesh. The number of its devices that split tokens must divide T.
        implementation: `MoEConfig.implementation`.
        x: (T, D).
        gates: (T, k) float32.
        weights: of all experts. The number of devices that split experts must divide X.
        experts: (T, k) int32.

    Returns:
        (T, D) in x's dtype, split as tokens are.
    """
    return _experts_on_mesh(_Layout(axes, implementation), x, gates, weights, experts)


class _Layout(NamedTuple):
    """Holds what is known when the program is compiled: the mesh, and `MoEConfig.implementation`."""

    axes: MeshAxes
    implementation: str

    @property
    def owners(self) -> int:
        """Returns P, the number of devices that experts are split over."""
        return self.axes.size(self.axes.experts)

    @property
    def tokens_differ(self) -> bool:
        """Tells whether owners of different experts have different tokens, so that rows must be exchanged."""
        return bool(self.axes.of_tokens(self.axes.experts))

    @property
    def inner(self) -> tuple[str, ...]:
        """Returns the mesh axes that split the inner width of every expert."""
        return ("tensor",) if self.axes.mesh.shape["tensor"] > 1 else ()

    @property
    def partial_sums(self) -> tuple[str, ...]:
        """Returns the mesh axes along which devices have parts of the sums for the same tokens."""
        return (() if self.tokens_differ else self.axes.experts) + self.inner

    @property
    def replicas(self) -> tuple[str, ...]:
        """Returns the mesh axes that split tokens and not experts."""
        return tuple(name for name in self.axes.tokens if name not in self.axes.experts)

    @property
    def tokens(self) -> P:
        """Returns the partition spec of x, gates and outputs."""
        return P(self.axes.tokens)

    @property
    def everywhere(self) -> P:
        """Returns the partition spec of what each device keeps for itself, stacked along a new first axis."""
        return P(self.axes.mesh.axis_names)

    def weights(self, weights: ExpertWeights) -> ExpertWeights:
        """Returns the partition specs of the experts' weights, gathered along `fsdp`."""
        into: ArrayTree = P(self.axes.experts, None, self.inner)
        out_of: ArrayTree = P(self.axes.experts, self.inner, None)
        return ExpertWeights(into, out_of, None if weights.w_gate is None else into)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts_on_mesh(
    layout: _Layout, x: jax.Array, gates: jax.Array, weights: ExpertWeights, experts: jax.Array
) -> jax.Array:
    return _experts_on_mesh_fwd(layout, x, gates, weights, experts)[0]


def _experts_on_mesh_fwd(
    layout: _Layout, x: jax.Array, gates: jax.Array, weights: ExpertWeights, experts: jax.Array
) -> tuple[jax.Array, _Residuals]:
    tokens = layout.tokens
    forward = island(
        layout.axes,
        partial(_forward, layout),
        (tokens, tokens, layout.weights(weights), tokens),
        (tokens, layout.everywhere),
    )
    y, kept = forward(x, gates, weights, experts)
    return y, (kept, x, gates, weights)


def _experts_on_mesh_bwd(
    layout: _Layout, residuals: _Residuals, d_y: jax.Array
) -> tuple[jax.Array, jax.Array, ExpertWeights, None]:
    tokens, of_weights = layout.tokens, layout.weights(residuals[-1])
    backward = island(
        layout.axes,
        partial(_backward, layout),
        (layout.everywhere, tokens, tokens, of_weights, tokens),
        (tokens, tokens, of_weights),
    )
    return *backward(*residuals, d_y), None


_experts_on_mesh.defvjp(_experts_on_mesh_fwd, _experts_on_mesh_bwd)


def _forward(
    layout: _Layout, x: jax.Array, gates: jax.Array, weights: ExpertWeights, experts: jax.Array
) -> tuple[jax.Array, ArrayTree]:
    """Computes one device's outputs (T, D), and what it keeps for the derivative."""
    if layout.tokens_differ:
        exchange = _prepare(layout, experts, weights.w_in.shape[0])
        y, pullback = jax.vjp(_round(layout, exchange), x, gates, weights)

        def further(number: jax.Array, y: jax.Array) -> jax.Array:
            return y + _round(layout, exchange, number)(x, gates, weights)

        if exchange.rounds is not None:
            y = lax.fori_loop(0, exchange.rounds, further, y)
    else:
        exchange = None
        y, pullback = jax.vjp(partial(_own_share, layout, experts), x, gates, weights)
    kept = jax.tree.map(lambda leaf: leaf[None], (pullback, exchange))
    with named_exchange(purposes.SUMS_OVER_EXPERTS):
        return lax.psum(y.astype(x.dtype), layout.partial_sums), kept


def _backward(
    layout: _Layout, kept: ArrayTree, x: jax.Array, gates: jax.Array, weights: ExpertWeights, d_y: jax.Array
) -> _Gradients:
    """Computes one device's derivatives by x (T, D), gates (T, k) and its experts' weights."""
    pullback, exchange = jax.tree.map(lambda leaf: leaf[0], kept)
    d_y = d_y.astype(jnp.float32)
    gradients = pullback(d_y)
    if exchange is not None and exchange.rounds is not None:
        # Further rounds are computed again: the size of what they need of the forward pass is not known when
        # the program is compiled.
        def further(number: jax.Array, gradients: _Gradients) -> _Gradients:
            _, pullback = jax.vjp(_round(layout, exchange, number), x, gates, weights)
            return jax.tree.map(jnp.add, gradients, pullback(d_y))

        gradients = lax.fori_loop(0, exchange.rounds, further, gradients)
    d_x, d_gates, d_weights = gradients
    with named_exchange(purposes.SUMS_OVER_EXPERTS):
        d_x, d_gates = lax.psum((d_x, d_gates), layout.partial_sums)
    with named_exchange(purposes.GRADIENTS_OF_EXPERTS):
        return d_x, d_gates, lax.psum(d_weights, layout.replicas)


def _own_share(
    layout: _Layout, experts: jax.Array, x: jax.Array, gates: jax.Array, weights: ExpertWeights
) -> jax.Array:
    """Returns what this device's experts add to its tokens' outputs, (T, D) float32."""
    num_own, size = weights.w_in.shape[0], experts.size
    first = lax.axis_index(layout.axes.experts) * num_own if layout.axes.experts else 0
    inside = (experts >= first) & (experts < first + num_own)
    plan = dispatch_plan(jnp.where(inside, experts - first, num_own), num_own + 1)
    start, load = plan.start[:num_own], plan.load[:num_own]
    plan = Dispatch(
        jnp.minimum(plan.expert, num_own - 1),
        jnp.where(jnp.arange(size, dtype=jnp.int32) < start[-1] + load[-1], plan.order, size),
        jnp.where(inside, plan.row, size),
        start,
        load,
    )
    shape = block_shape(size, num_own * layout.owners)
    return compute_experts(layout.implementation, x, gates, weights, plan, shape)


class _Exchange(NamedTuple):
    """Holds what a device knows of a group's exchange before the first row is sent, all int32."""

    plan: Dispatch
    """The device's own assignments to all X experts, sorted."""
    received: jax.Array
    """(P, X/P): number of assignments of each device of the group to each of this device's experts."""
    rounds: jax.Array | None
    """(), number of rounds after the first, equal in the whole group; None if the first has room for all."""


def _prepare(layout: _Layout, experts: jax.Array, num_own: int) -> _Exchange:
    """Sorts the assignments (T, k) to experts, and tells the owners how many they will receive."""
    plan = dispatch_plan(experts, num_own * layout.owners)
    load = plan.load.reshape(layout.owners, num_own)
    received = _all_to_all(layout, load, purposes.LOADS_OF_EXPERTS)
    capacity = exchange_capacity(experts.size, layout.owners)
    if capacity == experts.size:
        return _Exchange(plan, received, None)
    excess = jnp.maximum(jnp.max(jnp.sum(load, axis=1)) - capacity, 0)
    rows = overflow_capacity(capacity)
    with named_exchange(purposes.LOSSES_AND_METRICS):
        rounds = lax.pmax((excess + rows - 1) // rows, layout.axes.experts)
    return _Exchange(plan, received, rounds)


def _all_to_all(layout: _Layout, x: jax.Array, purpose: str) -> jax.Array:
    """Exchanges P parts of the first axis: part p goes to device p, and becomes what device p sent."""
    with named_exchange(purpose):
        return lax.all_to_all(x, layout.axes.experts, split_axis=0, concat_axis=0, tiled=True)


def _round(
    layout: _Layout, exchange: _Exchange, number: jax.Array | None = None
) -> Callable[[jax.Array, jax.Array, ExpertWeights], jax.Array]:
    """Returns the function that computes one round: what it adds to this device's outputs, (T, D) float32.

    The round is the first if `number` is None, else the further round of that number, counted from 0.
    """
    plan, owners = exchange.plan, layout.owners
    (_, k), num_own = plan.expert.shape, exchange.received.shape[1]
    capacity = exchange_capacity(plan.order.size, owners)
    # On average an owner receives as many assignments as it sends.
    shape = block_shape(plan.order.size, num_own)
    first: int | jax.Array = 0
    rows, purpose = capacity, purposes.TOKENS_TO_EXPERTS
    if number is not None:
        purpose = purposes.OVERFLOW_OF_EXPERTS
        rows = overflow_capacity(capacity)
        first, shape = capacity + number * rows, (0, shape[1])
    start = plan.start[::num_own]
    load = jnp.sum(plan.load.reshape(owners, num_own), axis=1, dtype=jnp.int32)
    assignment, place = window(plan, plan.expert // num_own, start, load, first, rows)
    arrived = _arrived(exchange.received, first, rows)
    ones = jnp.ones((owners * rows, 1), jnp.float32)

    def add(x: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
        sent = _all_to_all(layout, spread(x, assignment // k, place), purpose)
        # The cast to x's dtype rounds nothing: with one expert per row, y is a product in that dtype times 1.
        y = compute_experts(layout.implementation, sent, ones, weights, arrived, shape).astype(x.dtype)
        return combine(_all_to_all(layout, y, purpose), gates, assignment, place)

    return add


def _arrived(received: jax.Array, first: int | jax.Array, rows: int) -> Dispatch:
    """Sorts the P·rows rows that a round brings to an owner by the owner's experts.

    Args:
        received: (P, X/P) int32, number of assignments of each device to each expert. A device sends its
            assignments in the order of the experts.
        first: index of the first assignment that this round brings, among those of each device.
        rows: number of rows that each device sends.
    """
    devices, num_own = received.shape
    size = devices * rows
    end = jnp.cumsum(received, axis=1, dtype=jnp.int32)
    begin = jnp.maximum(end - received, first)
    here = jnp.maximum(jnp.minimum(end, first + rows) - begin, 0)
    load = jnp.sum(here, axis=0, dtype=jnp.int32)
    start = jnp.cumsum(load, dtype=jnp.int32) - load
    rank = first + jnp.arange(rows, dtype=jnp.int32)
    expert = jnp.sum(end[:, None, :] <= rank[None, :, None], axis=2, dtype=jnp.int32)
    own = jnp.minimum(expert, num_own - 1)
    # No sort is needed: each device's rows are sorted already, so it is enough to count the rows of other
    # devices that come before them.
    earlier = jnp.cumsum(here, axis=0, dtype=jnp.int32) - here
    ahead = jnp.take_along_axis(start[None, :] + earlier - begin, own, axis=1)
    row = jnp.where(expert < num_own, ahead + rank[None, :], size).reshape(-1)
    order = jnp.full(size, size, jnp.int32).at[row].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    return Dispatch(own.reshape(-1, 1), order, row.reshape(-1, 1), start, load)
