"""Defines what each optimizer does to a row of a table that was read, as small pure functions.

A rule is a pair (init, apply) with the list of arrays that it keeps (`ultramem_jax.config.row_states`). It
knows only rows and their gradients. `row_sparse` reads the rows, rounds the results and writes them back.

Every rule decays weights in the same way, decoupled as in AdamW (arXiv 1711.05101): a row that is read loses
rate·weight_decay of itself, in addition to its step. A row that is not read keeps every bit, its state
included. Where a step selects rows (`TrainConfig.slots_per_step`), the others count as not read.

State starts as zeros, whatever the rule. So a state in host memory can be created there.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.config import TrainConfig
from ultramem_jax.config.row_states import RowArray, row_arrays
from ultramem_jax.kernels.rules import RowKernel
from ultramem_jax.ops.rows import stored_dtype
from ultramem_jax.tree_types import ArrayTree

S = TypeVar("S")


class RowMoments(NamedTuple):
    """Holds Adam's moments of a table."""

    first: jax.Array
    """First moment: (N, d), float32 or bfloat16 as `ultramem_jax.ops.rows` stores it."""
    second: jax.Array
    """Second moment: (N, d) like the first, or (N, 1) float32, the mean over a row's values."""


class DatedMoments(NamedTuple):
    """Holds Adam's moments of a table, and the step at which each row was last read."""

    first: jax.Array
    """First moment, (N, d), as in `RowMoments`."""
    second: jax.Array
    """Second moment, (N, d) or (N, 1), as in `RowMoments`."""
    last: jax.Array
    """(N, 1) int32, the last step that read the row, counted from 1; 0 if no step has read it."""


class SquareSums(NamedTuple):
    """Holds Adagrad's accumulator of squared gradients."""

    squares: jax.Array
    """Sums of squared gradients. Per value: (N, d), float32 or bfloat16 as stored. Per row: (N, 1) float32,
    the sum of the means of these squares over a row."""


class Trace(NamedTuple):
    """Holds the momentum of SGD."""

    trace: jax.Array
    """Momentum: (N, d), float32 or bfloat16 as stored."""


class RowStep(NamedTuple):
    """Describes the step in which a rule is applied."""

    step: jax.Array
    """() int32, the step, counted from 0."""
    rate: jax.Array
    """() float32, the learning rate."""
    mean_over_row: Callable[[jax.Array], jax.Array]
    """(U, d) -> (U, 1), the mean over all columns of a row, including columns on other devices."""


class RowRule(NamedTuple):
    """Says what an optimizer keeps of a row and does to it."""

    kept: tuple[RowArray, ...]
    """The arrays of the state, in the order of its leaves. Their bytes are what the rule keeps per row."""
    init: Callable[[jax.Array], ArrayTree]
    """table (N, d) -> state, a tree of arrays (N, ...) of zeros."""
    apply: Callable[[RowStep, jax.Array, ArrayTree, jax.Array], tuple[jax.Array, ArrayTree]]
    """(step, rows (U, d), their state, gradients (U, d)) -> (rows, state) after the step. All are float32,
    except state that is stored as integers, which stays integer."""
    kernel: RowKernel | None = None
    """The same rule as a native kernel knows it; None if it knows none, and JAX must apply it."""


def row_rule(train: TrainConfig) -> RowRule:
    """Returns the rule that `train.row_optimizer` names, with the settings of the run."""
    decay, eps = train.weight_decay, train.eps
    kept = {"moment_dtype": train.row_moment_dtype}
    moments = kept | {"second_moment": train.row_second_moment}
    match train.row_optimizer:
        case "adamw":
            return adamw(train.b1, train.b2, eps, decay, **moments)
        case "adamw_catch_up":
            return adamw_catch_up(train.b1, train.b2, eps, decay, **moments)
        case "adagrad":
            return adagrad(eps, decay, **kept)
        case "adagrad_row":
            return adagrad_row(eps, decay)
        case "sgd":
            return sgd(decay)
        case "sgd_momentum":
            return sgd_momentum(train.momentum, decay, **kept)
    raise AssertionError(train.row_optimizer)


def adamw(
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    *,
    moment_dtype: str = "float32",
    second_moment: str = "element",
) -> RowRule:
    """Returns AdamW (arXiv 1711.05101) on the rows read. The moments of a row rest while it is not read.

    Bias correction counts the optimizer's steps, not the reads of a row, as in lazy Adam. On batches that
    read every row it equals `optax.adamw`.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: term that is added to the root of the second moment.
        weight_decay: weight decay; it is multiplied by the learning rate.
        moment_dtype: dtype of the moments of a row's values, `float32` or `bfloat16`.
        second_moment: `element`, one for every value; or `row`, one float32 for all values of a row, the mean
            of their squares (the blocks of Adam-mini, arXiv 2406.16793).
    """
    kept = row_arrays("adamw", second_moment, moment_dtype)

    def apply(
        at: RowStep, rows: jax.Array, moments: RowMoments, gradients: jax.Array
    ) -> tuple[jax.Array, RowMoments]:
        count = at.step.astype(jnp.float32) + 1
        squares = gradients**2
        if second_moment == "row":
            squares = at.mean_over_row(squares)
        first = b1 * moments.first + (1 - b1) * gradients
        second = b2 * moments.second + (1 - b2) * squares
        direction = (first / (1 - b1**count)) / (jnp.sqrt(second / (1 - b2**count)) + eps)
        return _stepped(rows, at.rate, direction, weight_decay), RowMoments(first, second)

    kernel = RowKernel("adamw", weight_decay, b1, b2, eps, one_per_row=second_moment == "row")
    return RowRule(kept, _zeros(RowMoments, kept), apply, kernel)


def adamw_catch_up(
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    *,
    moment_dtype: str = "float32",
    second_moment: str = "element",
) -> RowRule:
    """Returns AdamW in which a row that is read first catches up on the decay of its moments.

    If the last j steps did not read a row, its first moment is multiplied by b1^j and its second by b2^j.
    That is what j steps of AdamW with a gradient of zero do to the moments. Then the row takes the step of
    `adamw`, whose bias correction assumes that moments decay in every step. Only moments catch up. No missed
    step changes the row itself, neither by its momentum nor by weight decay.

    This rule has no dense equivalent: which rows change depends on which were read, and not on the gradient.
    Where every step reads every row, it equals `adamw`. The arguments are those of `adamw`.
    """
    kept = row_arrays("adamw_catch_up", second_moment, moment_dtype)
    step = adamw(b1, b2, eps, weight_decay, second_moment=second_moment).apply

    def apply(
        at: RowStep, rows: jax.Array, moments: DatedMoments, gradients: jax.Array
    ) -> tuple[jax.Array, DatedMoments]:
        # A row that was never read has moments of zero, which no power changes.
        missed = (at.step - moments.last).astype(jnp.float32)
        decayed = RowMoments(b1**missed * moments.first, b2**missed * moments.second)
        rows, (first, second) = step(at, rows, decayed, gradients)
        return rows, DatedMoments(first, second, jnp.full_like(moments.last, at.step + 1))

    kernel = RowKernel("adamw_catch_up", weight_decay, b1, b2, eps, one_per_row=second_moment == "row")
    return RowRule(kept, _zeros(DatedMoments, kept), apply, kernel)


def adagrad(eps: float, weight_decay: float, *, moment_dtype: str = "float32") -> RowRule:
    """Returns Adagrad with diagonal matrices (Duchi et al., JMLR 12, 2011).

    The direction is g / sqrt(s + eps²). Here s is the sum of the squares of a value's gradients, this one
    included. It starts at 0, so that a value's first step is as long as the learning rate. Where s is 0, the
    step is 0. Without weight decay it equals `optax.adagrad(rate, initial_accumulator_value=0, eps=eps**2)`
    on any batch, because a row that is not read has a gradient of zero.

    Args:
        eps: the smallest root to divide by, as in `adamw`. optax adds its own `eps` inside the root.
        weight_decay: weight decay; it is multiplied by the learning rate.
        moment_dtype: dtype of s, `float32` or `bfloat16`. Rounded to nearest, a bfloat16 stops growing once a
            square is below a 512th of it.
    """
    kept = row_arrays("adagrad", moment_dtype=moment_dtype)

    def apply(
        at: RowStep, rows: jax.Array, state: SquareSums, gradients: jax.Array
    ) -> tuple[jax.Array, SquareSums]:
        squares = state.squares + gradients**2
        direction = gradients * inverse_root(squares, eps)
        return _stepped(rows, at.rate, direction, weight_decay), SquareSums(squares)

    kernel = RowKernel("adagrad", weight_decay, eps=eps)
    return RowRule(kept, _zeros(SquareSums, kept), apply, kernel)


def adagrad_row(eps: float, weight_decay: float) -> RowRule:
    """Returns row-wise Adagrad: one sum for all values of a row, of the means of their squared gradients.

    Embedding tables of recommenders are trained this way (DLRM, arXiv 1906.00091; `EXACT_ROWWISE_ADAGRAD` of
    FBGEMM). The direction is g / sqrt(s + eps²), with s starting at 0 as in `adagrad`.

    Args:
        eps: the smallest root to divide by.
        weight_decay: weight decay; it is multiplied by the learning rate.
    """
    kept = row_arrays("adagrad_row")

    def apply(
        at: RowStep, rows: jax.Array, state: SquareSums, gradients: jax.Array
    ) -> tuple[jax.Array, SquareSums]:
        squares = state.squares + at.mean_over_row(gradients**2)
        direction = gradients * inverse_root(squares, eps)
        return _stepped(rows, at.rate, direction, weight_decay), SquareSums(squares)

    kernel = RowKernel("adagrad_row", weight_decay, eps=eps, one_per_row=True)
    return RowRule(kept, _zeros(SquareSums, kept), apply, kernel)


def sgd(weight_decay: float) -> RowRule:
    """Returns plain SGD, which keeps no state. Without weight decay it equals `optax.sgd` on any batch.

    Args:
        weight_decay: weight decay; it is multiplied by the learning rate.
    """

    def apply(
        at: RowStep, rows: jax.Array, state: optax.EmptyState, gradients: jax.Array
    ) -> tuple[jax.Array, optax.EmptyState]:
        return _stepped(rows, at.rate, gradients, weight_decay), state

    return RowRule((), lambda table: optax.EmptyState(), apply, RowKernel("sgd", weight_decay))


def sgd_momentum(momentum: float, weight_decay: float, *, moment_dtype: str = "float32") -> RowRule:
    """Returns SGD with momentum. The trace of a row rests while the row is not read.

    The trace is g + momentum·trace, without Nesterov's correction. On batches that read every row it equals
    `optax.sgd` with momentum.

    Args:
        momentum: decay of the trace.
        weight_decay: weight decay; it is multiplied by the learning rate, and does not enter the trace.
        moment_dtype: dtype of the trace, `float32` or `bfloat16`.
    """
    kept = row_arrays("sgd_momentum", moment_dtype=moment_dtype)

    def apply(at: RowStep, rows: jax.Array, state: Trace, gradients: jax.Array) -> tuple[jax.Array, Trace]:
        trace = gradients + momentum * state.trace
        return _stepped(rows, at.rate, trace, weight_decay), Trace(trace)

    kernel = RowKernel("sgd_momentum", weight_decay, momentum=momentum)
    return RowRule(kept, _zeros(Trace, kept), apply, kernel)


def inverse_root(squares: jax.Array, eps: float) -> jax.Array:
    """Returns 1 / sqrt(squares + eps²), and 0 where nothing has been summed, like `optax.scale_by_rss`.

    Args:
        squares: any shape, float32, sums of squares.
        eps: its square may be below the smallest float32.
    """
    return jnp.where(squares > 0, jax.lax.rsqrt(squares + eps**2), 0.0)


def _stepped(rows: jax.Array, rate: jax.Array, direction: jax.Array, weight_decay: float) -> jax.Array:
    """Returns rows after a step against the direction, with decoupled weight decay; (U, d) each."""
    return rows - rate * (direction + weight_decay * rows)


def _zeros(state: Callable[..., S], kept: tuple[RowArray, ...]) -> Callable[[jax.Array], S]:
    """Returns `RowRule.init` for a named tuple of the arrays kept."""

    def init(table: jax.Array) -> S:
        num_rows, width = table.shape
        return state(
            *(
                jnp.zeros(
                    (num_rows, width if array.per == "value" else 1),
                    jnp.int32 if array.dtype == "int32" else stored_dtype(array.dtype),
                )
                for array in kept
            )
        )

    return init
