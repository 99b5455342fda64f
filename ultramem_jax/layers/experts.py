"""The experts of a Mixture of Experts, computed on one device: every assignment of a token to an expert.

Every token is served by exactly k of X experts, however unequal their loads. What differs between the
implementations is only how the T·k assignments of tokens to experts become matrix products:

- `ragged`: the assignments sorted by expert, `jax.lax.ragged_dot`. For GPU and TPU.
- `blocks`: each expert has C slots for its first C assignments, computed as one batched product over all
  experts that reads the weights where they lie; assignments beyond C are computed in blocks of Z rows of one
  expert, by a loop whose length is known only at run time. For CPU, where XLA multiplies every row of a
  `ragged_dot` by every expert. With C near the mean load, all but a few assignments are in the batched
  product, the loop is short, and nothing is padded to a worst case. With fewer assignments than experts, as
  in decoding, C is 0 and the loop reads only the experts that were chosen.

Forward and backward at T 4096, D 192, F 384, X 32, k 2, float32, 2 CPU cores, against an MLP on T·k tokens
(the same products without routing): `blocks` takes 1.4 times as long under even loads, 1.6 when the busiest
expert has 2.2 times the mean, 2.4 when two experts get everything; the loop alone 2.1, `ragged` about 25.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ultramem_jax.layers.mlp import activated

MAX_OVERFLOW_ROWS = 128
"""Rows of an overflow block, at most: more are mostly padding, fewer do not pay for fetching the weights."""


class ExpertWeights(NamedTuple):
    """float32 weights of all experts, or of one (without the axis X).

    In `served_experts` each is a tuple of X `OutputMajor` instead.
    """

    w_in: jax.Array
    """(X, D, F)."""
    w_out: jax.Array
    """(X, F, D)."""
    w_gate: jax.Array | None
    """(X, D, F), or None for GELU experts."""


class Dispatch(NamedTuple):
    """The T·k assignments sorted by expert, and within an expert by token. All int32.

    Where some are of none of the X experts (`expert_parallel`), they are at no row: their `row` is T·k, as is
    `order` behind the last expert's last row, and their `expert` is any.
    """

    expert: jax.Array
    """(T, k): expert of each assignment."""
    order: jax.Array
    """(T·k,): assignment (token·k + choice) at each sorted row."""
    row: jax.Array
    """(T, k): sorted row of each assignment, the inverse of `order`."""
    start: jax.Array
    """(X,): first sorted row of each expert."""
    load: jax.Array
    """(X,): number of assignments of each expert."""


def dispatch_plan(experts: jax.Array, num_experts: int) -> Dispatch:
    """Sorts the assignments `experts` (T, k), int32 in [0, X), by expert."""
    flat = experts.reshape(-1)
    rows = jnp.arange(flat.size, dtype=jnp.int32)
    if num_experts * flat.size < 2**31:
        # One key that holds both expert and position sorts in less than half the time of a pair on CPU.
        order = lax.sort(flat * flat.size + rows) % flat.size
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(rows, unique_indices=True).reshape(experts.shape)
    ids = jnp.arange(num_experts, dtype=jnp.int32)
    load = jnp.sum(flat[:, None] == ids[None, :], axis=0, dtype=jnp.int32)
    return Dispatch(experts, order, row, jnp.cumsum(load, dtype=jnp.int32) - load, load)


def block_shape(num_assignments: int, num_experts: int) -> tuple[int, int]:
    """(C, Z) of `blocks` for T·k assignments to X experts: slots per expert, and rows of an overflow block.

    Two standard deviations above the mean load of a uniform router: a row of the batched product costs about
    half as much as one of the loop, and at small loads, where reading the weights takes the time, an empty
    slot costs nothing. With fewer assignments than experts only the loop leaves experts unread.
    """
    if num_assignments < num_experts:
        return 0, 1
    mean = num_assignments / num_experts
    capacity = math.ceil((mean + 2 * math.sqrt(mean)) / 4) * 4
    return capacity, min(capacity // 2, MAX_OVERFLOW_ROWS)


def _expert(x: jax.Array, weights: ExpertWeights) -> jax.Array:
    """Experts on their rows: (rows, D) and one expert's weights, or (X, rows, D) and all of them."""
    gate = None if weights.w_gate is None else x @ weights.w_gate.astype(x.dtype)
    return activated(x @ weights.w_in.astype(x.dtype), gate) @ weights.w_out.astype(x.dtype)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] over the first axis, zeros where the index is its length."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x: jax.Array, token: jax.Array, place: jax.Array) -> jax.Array:
    """Copies tokens to their places: x (T, D), token (P,), place (T, k) -> (P, D); zeros where token is T.

    `place` is the inverse of `token` (P for an assignment without a place). It makes the derivative a gather
    and a sum over k, where XLA would scatter.
    """
    return _rows(x, token)


def _spread_fwd(x, token, place):
    return spread(x, token, place), place


def _spread_bwd(place, dy):
    return _collect(dy, place), None, None


def _collect(y: jax.Array, place: jax.Array) -> jax.Array:
    """Sums y (P, D) at place (T, k) -> (T, D): Σ_j y[place[:, j]], zeros where place is P."""
    # One gather per choice: a gather of (T, k, D) and its sum would pass over memory twice.
    parts = [_rows(y, place[:, j]) for j in range(place.shape[1])]
    return sum(parts[1:], parts[0])


spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def combine(y: jax.Array, gates: jax.Array, assignment: jax.Array, place: jax.Array) -> jax.Array:
    """Σ_j gates[:, j]·y[place[:, j]]: y (P, D), gates (T, k) float32, place (T, k) -> (T, D) float32.

    `assignment` (P,) is the inverse of `place` (T·k for an empty one): the derivative too is only gathers.
    """
    total = jnp.zeros((place.shape[0], y.shape[1]), jnp.float32)
    for j in range(place.shape[1]):
        part = _rows(y, place[:, j]).astype(jnp.float32)
        total = total + gates[:, j, None] * part
    return total


def _combine_fwd(y, gates, assignment, place):
    return combine(y, gates, assignment, place), (y, gates, assignment, place)


def _combine_bwd(residuals, d_out):
    y, gates, assignment, place = residuals
    k = place.shape[1]
    gate = _rows(gates.reshape(-1), assignment)
    d_y = gate[:, None] * _rows(d_out, assignment // k)
    parts = [_rows(y, place[:, j]).astype(jnp.float32) for j in range(k)]
    d_gates = jnp.stack([jnp.sum(part * d_out, axis=-1) for part in parts], axis=-1)
    return d_y.astype(y.dtype), d_gates, None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def ragged_experts(x: jax.Array, gates: jax.Array, weights: ExpertWeights, plan: Dispatch) -> jax.Array:
    """Σ over a token's k experts of gate·expert(x), by `jax.lax.ragged_dot`.

    x (T, D), gates (T, k) float32 -> (T, D) float32; the products are in x's dtype.
    """
    dot = partial(lax.ragged_dot, group_sizes=plan.load)
    rows = spread(x, plan.order // gates.shape[1], plan.row)
    gate = None if weights.w_gate is None else dot(rows, weights.w_gate.astype(x.dtype))
    inner = activated(dot(rows, weights.w_in.astype(x.dtype)), gate)
    return combine(dot(inner, weights.w_out.astype(x.dtype)), gates, plan.order, plan.row)


def block_experts(
    x: jax.Array,
    gates: jax.Array,
    weights: ExpertWeights,
    plan: Dispatch,
    shape: tuple[int, int] | None = None,
) -> jax.Array:
    """The same sum as `ragged_experts`, by slots and overflow blocks of `shape` (C, Z); see the module.

    Differentiable once, in reverse (the loop's length is not known when the program is compiled).
    """
    return _block_experts(shape or block_shape(gates.size, plan.load.size), x, gates, weights, plan)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_experts(shape, x, gates, weights, plan):
    return _overflow(shape, x, gates, weights, plan, _slots(shape[0], x, gates, weights, plan))


def window(
    plan: Dispatch, group: jax.Array, start: jax.Array, load: jax.Array, first: int | jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Assignments number `first` to `first + rows` of every group, in a buffer with `rows` places for each.

    Args:
        plan: the sorted assignments.
        group: (T, k) int32, in [0, G): experts, or neighbouring experts as one.
        start: (G,) int32, first sorted row of each group.
        load: (G,) int32, its number of assignments.
        first: of each group's assignments.
        rows: of the buffer, for each group.

    Returns:
        The assignment at each place (G·rows,), T·k at an empty one; and its inverse, the place of each
        assignment (T, k), G·rows for one that has none. Both int32.
    """
    size = plan.order.size
    rank = first + jnp.arange(rows, dtype=jnp.int32)[None, :]
    sorted_row = jnp.where(rank < load[:, None], start[:, None] + rank, size)
    assignment = plan.order.at[sorted_row.reshape(-1)].get(mode="fill", fill_value=size)
    rank = plan.row - start[group]
    inside = (rank >= first) & (rank < jnp.minimum(first + rows, load[group]))
    return assignment, jnp.where(inside, group * rows + rank - first, load.size * rows)


def _slots(capacity: int, x: jax.Array, gates: jax.Array, weights: ExpertWeights, plan: Dispatch):
    """What the first `capacity` assignments of each expert add up to: (T, D) float32."""
    if capacity == 0:
        return jnp.zeros(x.shape, jnp.float32)
    num_experts, k = plan.load.size, gates.shape[1]
    assignment, place = window(plan, plan.expert, plan.start, plan.load, 0, capacity)
    rows = spread(x, assignment // k, place).reshape(num_experts, capacity, -1)
    return combine(_expert(rows, weights).reshape(-1, x.shape[1]), gates, assignment, place)


class _Block(NamedTuple):
    expert: jax.Array
    """()."""
    assignment: jax.Array
    """(Z,), T·k in the empty rows behind an expert's last assignment."""


def _overflow_blocks(shape: tuple[int, int], plan: Dispatch):
    """The number of blocks beyond the slots, int32 (), and the function from a block's number to `_Block`."""
    capacity, rows = shape
    blocks = (jnp.maximum(plan.load - capacity, 0) + rows - 1) // rows
    behind = jnp.cumsum(blocks, dtype=jnp.int32)

    def block(number: jax.Array) -> _Block:
        expert = jnp.sum(behind <= number, dtype=jnp.int32)
        first = plan.start[expert] + capacity + (number - (behind - blocks)[expert]) * rows
        sorted_row = first + jnp.arange(rows, dtype=jnp.int32)
        inside = sorted_row < plan.start[expert] + plan.load[expert]
        size = plan.order.size
        sorted_row = jnp.where(inside, sorted_row, size)
        return _Block(expert, plan.order.at[sorted_row].get(mode="fill", fill_value=size))

    return behind[-1], block


def _take_expert(weights: ExpertWeights, expert: jax.Array) -> ExpertWeights:
    return jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, expert, keepdims=False), weights)


def _gated_expert(x: jax.Array, gate: jax.Array, weights: ExpertWeights) -> jax.Array:
    return gate[:, None] * _expert(x, weights).astype(jnp.float32)


def _overflow(shape, x, gates, weights, plan, y):
    """Adds to y (T, D) float32 what the assignments beyond the slots contribute."""
    count, block = _overflow_blocks(shape, plan)
    k = gates.shape[1]

    def body(number, y):
        expert, assignment = block(number)
        rows = _rows(x, assignment // k)
        gate = _rows(gates.reshape(-1), assignment)
        out = _gated_expert(rows, gate, _take_expert(weights, expert))
        return y.at[assignment // k].add(out, mode="drop")

    return lax.fori_loop(0, count, body, y)


def _block_experts_fwd(shape, x, gates, weights, plan):
    y, pullback = jax.vjp(
        lambda x, gates, weights: _slots(shape[0], x, gates, weights, plan), x, gates, weights
    )
    return _overflow(shape, x, gates, weights, plan, y), (pullback, x, gates, weights, plan)


def _block_experts_bwd(shape, residuals, d_y):
    pullback, x, gates, weights, plan = residuals
    d_x, d_gates, d_weights = pullback(d_y)
    count, block = _overflow_blocks(shape, plan)
    k = gates.shape[1]

    # The loop adds to the gradients of the slots in place, so a short loop costs little. What it needs of
    # the forward pass it computes again: storing it would take a buffer for the worst case.
    def body(number, grads):
        d_x, d_gates, d_weights = grads
        expert, assignment = block(number)
        token = assignment // k
        rows = _rows(x, token)
        gate = _rows(gates.reshape(-1), assignment)
        _, block_pullback = jax.vjp(_gated_expert, rows, gate, _take_expert(weights, expert))
        d_rows, d_gate, d_block = block_pullback(_rows(d_y, token))
        d_weights = jax.tree.map(lambda total, part: total.at[expert].add(part), d_weights, d_block)
        d_x = d_x.at[token].add(d_rows, mode="drop")
        return d_x, d_gates.at[assignment].add(d_gate, mode="drop"), d_weights

    d_x, d_gates, d_weights = lax.fori_loop(0, count, body, (d_x, d_gates.reshape(-1), d_weights))
    return d_x, d_gates.reshape(gates.shape), d_weights, None


_block_experts.defvjp(_block_experts_fwd, _block_experts_bwd)


def compute_experts(
    implementation: str,
    x: jax.Array,
    gates: jax.Array,
    weights: ExpertWeights,
    plan: Dispatch,
    shape: tuple[int, int] | None = None,
) -> jax.Array:
    """`ragged_experts` or `block_experts`, as `MoEConfig.implementation` says; `shape` is for the latter."""
    if implementation == "auto":
        implementation = "blocks" if jax.default_backend() == "cpu" else "ragged"
    if implementation == "ragged":
        return ragged_experts(x, gates, weights, plan)
    return block_experts(x, gates, weights, plan, shape)
