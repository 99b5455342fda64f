"""Computes the experts of a Mixture of Experts on one device, for every assignment of a token to an expert.

Exactly k of X experts serve every token, however unequal the experts' loads are. The implementations differ
only in how the T·k assignments of tokens to experts become matrix products:

- `ragged`: sorts the assignments by expert and uses a ragged product, `tokamax.ragged_dot` where that is
  installed, or else `jax.lax.ragged_dot`. For TPU, and for GPU with tokamax.
- `groups`: cuts the sorted assignments of every expert into groups of Z rows, the last one padded, and
  computes one batched product over all groups, each with the weights of its expert. Shapes are fixed at any
  imbalance. For GPU without tokamax, where XLA multiplies every row of a `ragged_dot` by every expert.
- `blocks`: each expert has C slots for its first C assignments. One batched product over all experts computes
  them, and reads the weights in place. A loop computes assignments beyond C, Z rows of one expert at a time;
  its length is known only at run time. For CPU, where XLA multiplies every row of a `ragged_dot` by every
  expert. With C near the mean load, all but a few assignments are in the batched product, the loop is short,
  and nothing is padded to a worst case. With fewer assignments than experts, as in decoding, C is 0 and the
  loop reads only the chosen experts.

Forward and backward at T 4096, D 192, F 384, X 32, k 2, float32, 2 CPU cores, against an MLP on T·k tokens
(the same products without routing): `blocks` takes 1.4 times as long under even loads, 1.6 if the busiest
expert has 2.2 times the mean, 2.4 if two experts get everything; only the loop takes 2.1, `ragged` about 25.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ultramem_jax.config.exchange_shapes import group_rows
from ultramem_jax.layers.mlp import activated
from ultramem_jax.ops.algorithms import algorithms, has_tokamax
from ultramem_jax.platforms import LANES, platform

MAX_OVERFLOW_ROWS = 128
"""Most rows of an overflow group: more are mostly padding, fewer do not pay for fetching the weights."""


class ExpertWeights(NamedTuple):
    """Holds the float32 weights of all experts, or of one expert (without the axis X).

    In `served_experts` each is a tuple of X `OutputMajor` instead.
    """

    w_in: jax.Array
    """Weights of the first product, (X, D, F)."""
    w_out: jax.Array
    """Weights of the second product, (X, F, D)."""
    w_gate: jax.Array | None
    """Weights of the gate, (X, D, F), or None for GELU experts."""


class Dispatch(NamedTuple):
    """Lists the T·k assignments sorted by expert, and within an expert by token, all int32.

    In `expert_parallel`, some assignments belong to none of the X experts. They have no sorted row: their
    `row` is T·k, and their `expert` is arbitrary. `order` is T·k after the last expert's last row.
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PaddedExperts:
    """Holds weights of the experts of a served model, with F padded by zeros to a multiple of 128.

    The inner activations of the padding are zero, and so is what they add. A TPU keeps an array of (X, D, F)
    with D as its last axis if only D is a multiple of 128, and then copies all experts for every product (an
    audit of `moe-151m-2in32`: 166 MB in every layer of a decoding step).
    """

    weights: jax.Array
    """(X, D, F) or (X, F, D), with the padding."""

    @classmethod
    def of(cls, weights: jax.Array, axis: int) -> "PaddedExperts":
        """Pads F, which is an axis of `weights`."""
        room = [(0, -weights.shape[i] % LANES if i == axis else 0) for i in range(weights.ndim)]
        return cls(jnp.pad(weights, room))


_Shape = tuple[int, int]
"""C and Z, as `block_shape` returns them."""
_Gradients = tuple[jax.Array, jax.Array, ExpertWeights]
"""Derivatives by x, gates and weights."""
_Pullback = Callable[[jax.Array], _Gradients]
"""Function from the derivative by the outputs to those by x, gates and weights."""


def dispatch_plan(experts: jax.Array, num_experts: int) -> Dispatch:
    """Sorts the assignments `experts` (T, k), int32 in [0, X), by expert."""
    flat = experts.reshape(-1)
    rows = jnp.arange(flat.size, dtype=jnp.int32)
    if num_experts * flat.size < 2**31:
        # On CPU, sorting one key that holds expert and position takes less than half the time of a pair.
        order = lax.sort(flat * flat.size + rows) % flat.size
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(rows, unique_indices=True).reshape(experts.shape)
    ids = jnp.arange(num_experts, dtype=jnp.int32)
    load = jnp.sum(flat[:, None] == ids[None, :], axis=0, dtype=jnp.int32)
    return Dispatch(experts, order, row, jnp.cumsum(load, dtype=jnp.int32) - load, load)


def block_shape(num_assignments: int, num_experts: int) -> tuple[int, int]:
    """Returns (C, Z) of `blocks` for T·k assignments to X experts: slots per expert, rows per overflow group.

    C is two standard deviations above the mean load of a uniform router. A row of the batched product costs
    about half as much as one of the loop. At small loads, where reading the weights takes the time, an empty
    slot costs nothing. With fewer assignments than experts C is 0, because only the loop leaves experts
    unread.
    """
    if num_assignments < num_experts:
        return 0, 1
    mean = num_assignments / num_experts
    capacity = math.ceil((mean + 2 * math.sqrt(mean)) / 4) * 4
    return capacity, min(capacity // 2, MAX_OVERFLOW_ROWS)


def _expert(x: jax.Array, weights: ExpertWeights) -> jax.Array:
    """Applies experts to their rows: one expert to (rows, D), or all to (X, rows, D)."""
    gate = None if weights.w_gate is None else x @ weights.w_gate.astype(x.dtype)
    return activated(x @ weights.w_in.astype(x.dtype), gate) @ weights.w_out.astype(x.dtype)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x[index] over the first axis, and zeros where the index is the axis's length."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x: jax.Array, token: jax.Array, place: jax.Array) -> jax.Array:
    """Copies tokens to their rows of a buffer: x (T, D), token (P,), place (T, k) -> (P, D).

    Rows whose token is T become zeros. `place` is the inverse of `token`, and P for an assignment without a
    row. With it the derivative is a gather and a sum over k, where XLA would scatter.
    """
    return _rows(x, token)


def _spread_fwd(x: jax.Array, token: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    return spread(x, token, place), place


def _spread_bwd(place: jax.Array, dy: jax.Array) -> tuple[jax.Array, None, None]:
    return _collect(dy, place), None, None


def _collect(y: jax.Array, place: jax.Array) -> jax.Array:
    """Sums rows of y (P, D) at place (T, k) -> (T, D): Σ_j y[place[:, j]], zeros where place is P."""
    # There is one gather per choice: a gather of (T, k, D) and its sum would go through the rows twice.
    parts = [_rows(y, place[:, j]) for j in range(place.shape[1])]
    return sum(parts[1:], parts[0])


spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def combine(y: jax.Array, gates: jax.Array, assignment: jax.Array, place: jax.Array) -> jax.Array:
    """Sums gates·rows for every token, Σ_j gates[:, j]·y[place[:, j]] -> (T, D) float32.

    The shapes are y (P, D), gates (T, k) float32 and place (T, k). `assignment` (P,) is the inverse of
    `place`, and T·k for an empty row. With it the derivative, too, needs only gathers.
    """
    total = jnp.zeros((place.shape[0], y.shape[1]), jnp.float32)
    for j in range(place.shape[1]):
        part = _rows(y, place[:, j]).astype(jnp.float32)
        total = total + gates[:, j, None] * part
    return total


def _combine_fwd(
    y: jax.Array, gates: jax.Array, assignment: jax.Array, place: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return combine(y, gates, assignment, place), (y, gates, assignment, place)


def _combine_bwd(
    residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    y, gates, assignment, place = residuals
    k = place.shape[1]
    gate = _rows(gates.reshape(-1), assignment)
    d_y = gate[:, None] * _rows(d_out, assignment // k)
    parts = [_rows(y, place[:, j]).astype(jnp.float32) for j in range(k)]
    d_gates = jnp.stack([jnp.sum(part * d_out, axis=-1) for part in parts], axis=-1)
    return d_y.astype(y.dtype), d_gates, None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def ragged_experts(x: jax.Array, gates: jax.Array, weights: ExpertWeights, plan: Dispatch) -> jax.Array:
    """Sums gate·expert(x) over a token's k experts, by a ragged product.

    Maps x (T, D) and gates (T, k) float32 to (T, D) float32; the products are in x's dtype.
    """
    dot = partial(_ragged_dot(), group_sizes=plan.load)
    rows = spread(x, plan.order // gates.shape[1], plan.row)
    gate = None if weights.w_gate is None else dot(rows, weights.w_gate.astype(x.dtype))
    inner = activated(dot(rows, weights.w_in.astype(x.dtype)), gate)
    return combine(dot(inner, weights.w_out.astype(x.dtype)), gates, plan.order, plan.row)


def _ragged_dot() -> Callable[..., jax.Array]:
    if platform() == "cpu" or not has_tokamax():
        return lax.ragged_dot
    dot: Callable[..., jax.Array] = importlib.import_module("tokamax").ragged_dot
    return dot


def grouped_experts(x: jax.Array, gates: jax.Array, weights: ExpertWeights, plan: Dispatch) -> jax.Array:
    """Sums gate·expert(x) over a token's k experts, by groups of rows of one expert.

    The module's docstring explains them. Arguments and result are those of `ragged_experts`.
    """
    count, k, num_experts = gates.size, gates.shape[1], plan.load.size
    rows = group_rows(count, num_experts)
    num_groups = count // rows + num_experts
    groups = (plan.load + rows - 1) // rows
    first = jnp.cumsum(groups, dtype=jnp.int32) - groups
    number = jnp.arange(num_groups, dtype=jnp.int32)
    expert = jnp.sum((first + groups)[None, :] <= number[:, None], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)  # groups that nobody needs have no rows
    rank = (number - first[expert])[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)[None, :]
    sorted_row = jnp.where(rank < plan.load[expert][:, None], plan.start[expert][:, None] + rank, count)
    assignment = plan.order.at[sorted_row.reshape(-1)].get(mode="fill", fill_value=count)
    rank = plan.row - plan.start[plan.expert]
    place = (first[plan.expert] + rank // rows) * rows + rank % rows
    place = jnp.where(plan.row < count, place, num_groups * rows)
    buffer = spread(x, assignment // k, place).reshape(num_groups, rows, -1)

    y = _experts_of_groups(buffer, weights, expert)
    return combine(y.reshape(-1, x.shape[1]), gates, assignment, place)


@jax.custom_vjp
def _experts_of_groups(buffer: jax.Array, weights: ExpertWeights, expert: jax.Array) -> jax.Array:
    """Applies to every group of rows (G, Z, D) the expert (G,) that it belongs to -> (G, Z, D)."""
    return _expert(buffer, _gathered(weights, expert, buffer.dtype))


_GroupResiduals = tuple[jax.Array, jax.Array, jax.Array | None, ExpertWeights, jax.Array]
"""Rows, both inner products, all experts, and the expert of every group."""


def _experts_of_groups_fwd(
    buffer: jax.Array, weights: ExpertWeights, expert: jax.Array
) -> tuple[jax.Array, _GroupResiduals]:
    w_in, w_out, w_gate = _gathered(weights, expert, buffer.dtype)
    inner, gate = buffer @ w_in, None if w_gate is None else buffer @ w_gate
    return activated(inner, gate) @ w_out, (buffer, inner, gate, weights, expert)


def _experts_of_groups_bwd(
    residuals: _GroupResiduals, d_y: jax.Array
) -> tuple[jax.Array, ExpertWeights, None]:
    buffer, inner, gate, weights, expert = residuals
    # The weights of groups are several times those of the experts. They are gathered again, and not before
    # the backward pass has come here: so the index depends on it. Where that number is NaN, other experts'
    # weights are gathered. The gradient's norm is NaN then, too, and the step writes nothing.
    is_nan = jnp.isnan(d_y[0, 0, 0]).astype(jnp.int32)
    again = jnp.minimum(expert + is_nan, weights.w_in.shape[0] - 1)
    w_in, w_out, w_gate = _gathered(weights, again, buffer.dtype)
    act, act_pullback = jax.vjp(activated, inner, gate)
    d_inner, d_gate = act_pullback(d_y @ w_out.mT)
    d_buffer = d_inner @ w_in.mT

    def of_experts(rows: jax.Array, d_rows: jax.Array, like: jax.Array) -> jax.Array:
        return _sums_of_experts(rows.mT @ d_rows, expert, like)

    d_w_gate = None
    if w_gate is not None and d_gate is not None and weights.w_gate is not None:
        d_buffer = d_buffer + d_gate @ w_gate.mT
        d_w_gate = of_experts(buffer, d_gate, weights.w_gate)
    d_w_in = of_experts(buffer, d_inner, weights.w_in)
    d_weights = ExpertWeights(d_w_in, of_experts(act, d_y, weights.w_out), d_w_gate)
    return d_buffer, d_weights, None


_experts_of_groups.defvjp(_experts_of_groups_fwd, _experts_of_groups_bwd)


def _gathered(weights: ExpertWeights, expert: jax.Array, dtype: jnp.dtype) -> ExpertWeights:
    """Returns the weights of the expert of every group, in the dtype of the computation."""
    return jax.tree.map(lambda w: w.astype(dtype).at[expert].get(mode="promise_in_bounds"), weights)


def _sums_of_experts(of_groups: jax.Array, expert: jax.Array, like: jax.Array) -> jax.Array:
    """Sums arrays of groups (G, ...) over those of every expert -> (X, ...), with the dtype of `like`."""
    # A product with zeros and ones: a scatter would be atomic, and of few, large rows.
    belongs = jax.nn.one_hot(expert, like.shape[0], dtype=of_groups.dtype, axis=0)
    flat = of_groups.reshape(of_groups.shape[0], -1)
    sums = jnp.matmul(belongs, flat, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return sums.reshape(like.shape).astype(like.dtype)


def block_experts(
    x: jax.Array,
    gates: jax.Array,
    weights: ExpertWeights,
    plan: Dispatch,
    shape: tuple[int, int] | None = None,
) -> jax.Array:
    """Sums gate·expert(x) over a token's k experts, by slots and overflow groups of `shape` (C, Z).

    The module's docstring explains both. Arguments and result are those of `ragged_experts`. Differentiable
    once, in reverse, because the loop's length is not known when the program is compiled.
    """
    return _block_experts(shape or block_shape(gates.size, plan.load.size), x, gates, weights, plan)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_experts(
    shape: _Shape, x: jax.Array, gates: jax.Array, weights: ExpertWeights, plan: Dispatch
) -> jax.Array:
    return _overflow(shape, x, gates, weights, plan, _slots(shape[0], x, gates, weights, plan))


def window(
    plan: Dispatch, group: jax.Array, start: jax.Array, load: jax.Array, first: int | jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Puts every group's assignments from `first` to `first + rows` into a buffer with `rows` rows per group.

    Args:
        plan: the sorted assignments.
        group: (T, k) int32 in [0, G), group of each assignment: its expert, or several consecutive experts.
        start: (G,) int32, first sorted row of each group.
        load: (G,) int32, number of assignments of each group.
        first: index, within each group, of the first assignment taken.
        rows: rows of the buffer for each group.

    Returns:
        The assignment at each row of the buffer (G·rows,), T·k at an empty row; and its inverse, the buffer
        row of each assignment (T, k), G·rows for one that has none. Both int32.
    """
    size = plan.order.size
    rank = first + jnp.arange(rows, dtype=jnp.int32)[None, :]
    sorted_row = jnp.where(rank < load[:, None], start[:, None] + rank, size)
    assignment = plan.order.at[sorted_row.reshape(-1)].get(mode="fill", fill_value=size)
    rank = plan.row - start[group]
    inside = (rank >= first) & (rank < jnp.minimum(first + rows, load[group]))
    return assignment, jnp.where(inside, group * rows + rank - first, load.size * rows)


def _slots(
    capacity: int, x: jax.Array, gates: jax.Array, weights: ExpertWeights, plan: Dispatch
) -> jax.Array:
    """Returns what the first `capacity` assignments of each expert add up to: (T, D) float32."""
    if capacity == 0:
        return jnp.zeros(x.shape, jnp.float32)
    num_experts, k = plan.load.size, gates.shape[1]
    assignment, place = window(plan, plan.expert, plan.start, plan.load, 0, capacity)
    rows = spread(x, assignment // k, place).reshape(num_experts, capacity, -1)
    return combine(_expert(rows, weights).reshape(-1, x.shape[1]), gates, assignment, place)


class _Block(NamedTuple):
    """Lists the assignments of an overflow group, all of one expert, int32."""

    expert: jax.Array
    """(), the expert."""
    assignment: jax.Array
    """(Z,), the assignments; T·k in the empty rows after the expert's last one."""


def _overflow_blocks(shape: _Shape, plan: Dispatch) -> tuple[jax.Array, Callable[[jax.Array], _Block]]:
    """Returns the number of overflow groups, int32 (), and the function from a group's number to `_Block`."""
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


def _overflow(
    shape: _Shape, x: jax.Array, gates: jax.Array, weights: ExpertWeights, plan: Dispatch, y: jax.Array
) -> jax.Array:
    """Adds to y (T, D) float32 what the assignments beyond the slots contribute."""
    count, block = _overflow_blocks(shape, plan)
    k = gates.shape[1]

    def body(number: jax.Array, y: jax.Array) -> jax.Array:
        expert, assignment = block(number)
        rows = _rows(x, assignment // k)
        gate = _rows(gates.reshape(-1), assignment)
        out = _gated_expert(rows, gate, _take_expert(weights, expert))
        return y.at[assignment // k].add(out, mode="drop")

    return lax.fori_loop(0, count, body, y)


def _block_experts_fwd(
    shape: _Shape, x: jax.Array, gates: jax.Array, weights: ExpertWeights, plan: Dispatch
) -> tuple[jax.Array, tuple[_Pullback, jax.Array, jax.Array, ExpertWeights, Dispatch]]:
    y, pullback = jax.vjp(
        lambda x, gates, weights: _slots(shape[0], x, gates, weights, plan), x, gates, weights
    )
    return _overflow(shape, x, gates, weights, plan, y), (pullback, x, gates, weights, plan)


def _block_experts_bwd(
    shape: _Shape,
    residuals: tuple[_Pullback, jax.Array, jax.Array, ExpertWeights, Dispatch],
    d_y: jax.Array,
) -> tuple[jax.Array, jax.Array, ExpertWeights, None]:
    pullback, x, gates, weights, plan = residuals
    d_x, d_gates, d_weights = pullback(d_y)
    count, block = _overflow_blocks(shape, plan)
    k = gates.shape[1]

    # The loop adds to the gradients of the slots in place, so a short loop costs little. It computes again
    # what it needs of the forward pass: storing that would take a buffer for the worst case.
    def body(number: jax.Array, grads: _Gradients) -> _Gradients:
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
    """Computes `ragged_experts`, `grouped_experts` or `block_experts`, by `MoEConfig.implementation`.

    `auto` is the algorithm of the platform. Only `block_experts` uses `shape`.
    """
    if implementation == "auto":
        implementation = algorithms().experts
    if implementation == "ragged":
        return ragged_experts(x, gates, weights, plan)
    if implementation == "groups":
        return grouped_experts(x, gates, weights, plan)
    return block_experts(x, gates, weights, plan, shape)
