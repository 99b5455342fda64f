"""The experts of a Mixture of Experts that is served on CPU: each an array of its own, read if it is chosen.

A decoding step has few tokens for many experts, so its time is that of reading weights. One product over
the stacked weights of all experts (`experts.block_experts`) reads also those that nobody chose, and XLA
copies an expert that a loop cuts out of the stack. Here every expert has a loop of its own over blocks of its
tokens: of no turn where it was not chosen, mostly of one where it was.

32 experts, D 1,024, F 2,528, 64 tokens with k 2, on 2 CPU cores that read 34 GB/s: 25 GB/s in float32, 12 in
bfloat16. One product over the stack, with room for each expert, reads 14 and 1.4; every way that was tried
is in docs/performance.md, "Decoding".
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ultramem_jax.layers.experts import ExpertWeights, combine, dispatch_plan
from ultramem_jax.layers.mlp import activated
from ultramem_jax.ops.linear import LEAST_ROWS, OutputMajor, project

_ALONE = 0.25
"""Mean load up to which a second reading of an expert, for a second token, is rare enough: in float32 on 2
cores an expert of D 1,024 and F 2,528 takes 0.68 ms for one row and 0.72 to 1.0 for four."""
_DEVIATIONS = 1.4
"""Rows above the mean load, in its standard deviations: of what was measured the best at means of 1 to 16."""


def served_experts(x: jax.Array, gates: jax.Array, experts: jax.Array, weights: ExpertWeights) -> jax.Array:
    """Σ over a token's k experts of gate·expert(x), however unequal the loads. No derivative.

    Args:
        x: (T, D), in the dtype of the computation.
        gates: (T, k) float32.
        experts: (T, k) int32 in [0, X).
        weights: each a tuple of X `OutputMajor`.

    Returns:
        (T, D) float32.
    """
    num_experts, assignments = len(weights.w_in), experts.size
    plan = dispatch_plan(experts, num_experts)
    rows = block_rows(assignments, num_experts, x.dtype)
    # Behind an expert's last token a block has rows of the next expert, or of nobody. What comes of them is
    # overwritten by the next expert, or not looked at.
    padded = jnp.pad(x[plan.order // experts.shape[1]], ((0, rows), (0, 0)))
    y = jnp.zeros(padded.shape, jnp.float32)
    for expert in range(num_experts):
        w_in, w_out = weights.w_in[expert], weights.w_out[expert]
        w_gate = None if weights.w_gate is None else weights.w_gate[expert]

        def block(number, y, first=plan.start[expert], w_in=w_in, w_out=w_out, w_gate=w_gate):
            at = first + number * rows
            out = _expert(lax.dynamic_slice_in_dim(padded, at, rows), w_in, w_out, w_gate)
            return lax.dynamic_update_slice_in_dim(y, out, at, 0)

        y = lax.fori_loop(0, -(-plan.load[expert] // rows), block, y)
    return combine(y, gates, plan.order, plan.row)


def block_rows(assignments: int, num_experts: int, dtype: jnp.dtype) -> int:
    """Rows of a block for T·k assignments to X experts: enough for most loads, but not for the largest.

    Where hardly any expert has two tokens a block is of one, but in bfloat16 of as many rows as `project`
    makes of it anyway. Else it is of a number that the kernels are good at (docs/performance.md, "Decoding").
    """
    mean = assignments / num_experts
    if mean <= _ALONE and dtype == jnp.float32:
        return 1
    rows = mean + _DEVIATIONS * math.sqrt(mean)
    small, step = ((4, 8, 16), 16) if dtype == jnp.float32 else ((LEAST_ROWS, 8, 12), 8)
    return next((size for size in small if rows <= size), round(rows / step) * step)


def _expert(x: jax.Array, w_in: OutputMajor, w_out: OutputMajor, w_gate: OutputMajor | None) -> jax.Array:
    inner = activated(project(x, w_in), None if w_gate is None else project(x, w_gate))
    return project(inner, w_out, jnp.float32)
