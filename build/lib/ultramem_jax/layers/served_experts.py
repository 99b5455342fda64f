"""Computes the experts of a Mixture of Experts served on CPU, and reads only the chosen ones.

A decoding step has few tokens for many experts, so it spends its time reading weights. One product over the
stacked weights of all experts (`experts.block_experts`) also reads those that no token chose. XLA copies an
expert that a loop cuts out of the stack. So here every expert is an array of its own, and has a loop of its
own over groups of its tokens. The loop makes no turn if the expert was not chosen, and mostly one if it was.

32 experts, D 1,024, F 2,528, 64 tokens with k 2, on 2 CPU cores that read 34 GB/s: 25 GB/s in float32, 12 in
bfloat16. One product over the stack, with room for each expert, reads 14 and 1.4. Everything that was tried
is in docs/performance.md, "Decoding".
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ultramem_jax.layers.experts import ExpertWeights, combine, dispatch_plan
from ultramem_jax.layers.mlp import activated
from ultramem_jax.ops.linear import LEAST_ROWS, Matrix, project

_ALONE = 0.25
"""Largest mean load at which an expert is rarely read a second time, for a second token. In float32 on 2 CPU
cores an expert of D 1,024 and F 2,528 takes 0.68 ms for one row and 0.72 to 1.0 for four."""
_DEVIATIONS = 1.4
"""Rows of a group above the mean load, in its standard deviations: the best measured at means of 1 to 16."""


def served_experts(x: jax.Array, gates: jax.Array, experts: jax.Array, weights: ExpertWeights) -> jax.Array:
    """Sums gate·expert(x) over a token's k experts, however unequal the loads are.

    Args:
        x: (T, D), in the dtype of the computation.
        gates: (T, k) float32.
        experts: (T, k) int32 in [0, X).
        weights: each a tuple of X `OutputMajor`.

    Returns:
        (T, D) float32. It has no derivative.
    """
    num_experts, assignments = len(weights.w_in), experts.size
    plan = dispatch_plan(experts, num_experts)
    rows = block_rows(assignments, num_experts, x.dtype)
    # After an expert's last token, a group has rows of the next expert, or padding. The next expert
    # overwrites the results of the former, and nobody reads those of the latter.
    padded = jnp.pad(x[plan.order // experts.shape[1]], ((0, rows), (0, 0)))
    y = jnp.zeros(padded.shape, jnp.float32)
    for expert in range(num_experts):
        w_in, w_out = weights.w_in[expert], weights.w_out[expert]
        w_gate = None if weights.w_gate is None else weights.w_gate[expert]

        def block(
            number: jax.Array,
            y: jax.Array,
            first: jax.Array = plan.start[expert],
            w_in: Matrix = w_in,
            w_out: Matrix = w_out,
            w_gate: Matrix | None = w_gate,
        ) -> jax.Array:
            at = first + number * rows
            out = _expert(lax.dynamic_slice_in_dim(padded, at, rows), w_in, w_out, w_gate)
            return lax.dynamic_update_slice_in_dim(y, out, at, 0)

        y = lax.fori_loop(0, -(-plan.load[expert] // rows), block, y)
    return combine(y, gates, plan.order, plan.row)


def block_rows(assignments: int, num_experts: int, dtype: jnp.dtype) -> int:
    """Returns the number of rows of a group for T·k assignments to X experts.

    It is enough for most loads, but not for the largest. If hardly any expert has two tokens, a group has one
    row; in bfloat16 it has the rows that `project` pads it to anyway. Otherwise its size is one at which the
    kernels are fast (docs/performance.md, "Decoding").
    """
    mean = assignments / num_experts
    if mean <= _ALONE and dtype == jnp.float32:
        return 1
    rows = mean + _DEVIATIONS * math.sqrt(mean)
    small, step = ((4, 8, 16), 16) if dtype == jnp.float32 else ((LEAST_ROWS, 8, 12), 8)
    return next((size for size in small if rows <= size), round(rows / step) * step)


def _expert(x: jax.Array, w_in: Matrix, w_out: Matrix, w_gate: Matrix | None) -> jax.Array:
    inner = activated(project(x, w_in), None if w_gate is None else project(x, w_gate))
    return project(inner, w_out, jnp.float32)
