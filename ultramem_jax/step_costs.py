"""What a training step of one memory layer must compute and move, by part, from its config alone.

These are floors, for timings to stand beside: what a program could not do without, however it is written.
FLOPs are those of products with a width, two per multiplication and addition, as in
`ultramem_jax.accounting`; norms, comparisons, addresses and the arithmetic of optimizers, Muon's products of
matrices among it, are left out. Bytes are those of parameters, rows and moments that have to come from memory
or go there, each part by itself: activations, scores and gradients of rows among them, can stay in the cache,
and so can weights and keys between the forward and the backward pass. The letters are those of the axis
legend in `ultramem_jax`; T is tokens, R = H·m the reads of one, P the dense parameters of the layer, U the
distinct rows of a step.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from ultramem_jax.accounting import (
    PartCost,
    count_parameters,
    expected_rows,
    flops_per_token,
    moments_kept,
    row_bytes,
)
from ultramem_jax.config import RunConfig
from ultramem_jax.errors import UserError, at_least

_PARAMETER_BYTES = 4
UPDATE_ARRAYS = 3
"""Parameter and gradient are read, and the parameter is written. Each moment is read and written besides:
seven arrays in all with AdamW, five with Lion."""


@dataclass(frozen=True)
class MemoryStepCosts:
    """The parts of a step of one memory layer, in the order in which they run.

    Rows are U·d_v values of the table's dtype; "way" is `TrainConfig.table_gradient`.
    """

    query: PartCost
    """FLOPs 2·T·(D·2·(queries)·d_k + D·(width of the convolution)). Bytes: those weights."""
    side_scores: PartCost
    """FLOPs 2·T·2·H·K·w, w the width that `ops.key_scores.combined_scores` contracts over: d_k, or r·d_k with
    a query per rank. Bytes: all keys, once; the scores are forgotten as soon as the m best are known."""
    candidates: PartCost
    """Scores of the 2·H·m candidates under every rank. FLOPs 2·T·2·H·m·r·(width of a rank's key). No bytes:
    the keys were just read."""
    grid: PartCost
    """FLOPs T·H·(2·r²·m + 2·r·m²) of the exact grid and T·H·h·m·(2·r² + 2·r) of the cores; without a Tucker
    core T·H·(m² + m). No bytes."""
    lookup: PartCost
    """FLOPs 2·T·R·d_v. Bytes: every distinct row, once."""
    projection: PartCost
    """FLOPs 2·T·(blocks)·d_v·D. Bytes: its weights."""
    backward: PartCost
    """FLOPs: twice those of query, candidates and projection (by input and by weight) and once those of the
    lookup (by score). The other keys have no gradient. Bytes: the rows once more, and the gradient of every
    dense parameter, keys among them: 4·P."""
    row_gradients: PartCost
    """FLOPs 2·T·R·d_v: what each read sends to its row, and its sum. No bytes: a row is moved on as soon as
    its gradient is complete. In the dense way 4·N·d_v, the gradient of the whole table."""
    row_update: PartCost
    """Bytes: every distinct row and its moments, read and written. In the dense way all N rows: table,
    gradient and moments read, all but the gradient written, with AdamW 7·4·N·d_v."""
    dense_optimizer: PartCost
    """Bytes: parameter, gradient and moments read, all but the gradient written; with AdamW 7·4·P."""

    @property
    def total(self) -> PartCost:
        """The whole step."""
        return _total(getattr(self, field.name) for field in dataclasses.fields(self))


def memory_step_costs(config: RunConfig, tokens: int) -> MemoryStepCosts:
    """The cost of one training step of the model's memory, taken alone.

    Args:
        config: of a model with one memory, without pre-values and gate.
        tokens: T.

    Raises:
        UserError: another kind of model, or no tokens.
    """
    at_least(1, tokens=tokens)
    memory, layout = config.model.memory, config.model.layout
    if memory is None or layout is None or len(config.model.spans) != 1:
        raise UserError("model.memory: the cost of a step is counted for models with one memory")
    if memory.pre_value_dim or memory.gate:
        raise UserError("model.memory: the cost of a step is counted without pre-values and without a gate")
    flops, parameters = flops_per_token(config.model), count_parameters(config.model)
    heads, top_m, ranks = memory.num_heads, memory.top_m, memory.num_ranks
    width = memory.key_dim * (ranks if memory.query_per_rank else 1)
    side_scores = 2 * 2 * heads * layout.num_virtual_keys * width
    candidates = 2 * 2 * heads * top_m * ranks * memory.rank_key_dim
    # `accounting` weighs the ranks' scores of all keys, which is part of the one product here.
    weighing = heads * 2 * 2 * ranks * layout.num_virtual_keys if memory.tucker_rank else 0
    rows = expected_rows(layout.num_slots, tokens * heads * top_m)
    of_row = row_bytes(memory, config.train)
    matrices = parameters.memory_queries + parameters.memory_projection
    others = parameters.memory_norms + parameters.memory_cores + parameters.memory_conv
    others += parameters.memory_keys
    dense = matrices + others
    if config.train.table_gradient == "dense":
        gradient = layout.num_slots * memory.value_dim * _PARAMETER_BYTES
        update = UPDATE_ARRAYS * gradient + 2 * layout.num_slots * of_row.moments
    else:
        gradient, update = 0, round(2 * rows * of_row.total)

    def cost(flops_of_token: int, moved: float = 0) -> PartCost:
        return PartCost(tokens * flops_of_token, round(moved))

    return MemoryStepCosts(
        query=cost(
            flops.memory_queries, _PARAMETER_BYTES * (parameters.memory_queries + parameters.memory_conv)
        ),
        side_scores=cost(side_scores, _PARAMETER_BYTES * parameters.memory_keys),
        candidates=cost(candidates),
        grid=cost(flops.memory_scoring - weighing),
        lookup=cost(flops.memory_lookup, rows * of_row.table),
        projection=cost(flops.memory_projection, _PARAMETER_BYTES * parameters.memory_projection),
        backward=cost(
            2 * (flops.memory_queries + candidates + flops.memory_projection) + flops.memory_lookup,
            rows * of_row.table + _PARAMETER_BYTES * dense,
        ),
        row_gradients=cost(flops.memory_lookup, gradient),
        row_update=cost(0, update),
        dense_optimizer=cost(0, _update_bytes(config, matrices, others)),
    )


def model_step_cost(config: RunConfig, tokens: int) -> PartCost:
    """The cost of one training step of the whole model: its memory, and three forward passes of the rest.

    Every other parameter is read, its gradient written, and updated by the optimizer.

    Args:
        config: of a model that `memory_step_costs` takes, with MLPs.
        tokens: T, in sequences of `data.seq_len`.

    Raises:
        UserError: another kind of model, or no tokens.
    """
    of_memory = memory_step_costs(config, tokens).total
    if config.model.moe is not None:
        raise UserError("model.moe: the cost of a step is counted for models with MLPs")
    flops, parameters = flops_per_token(config.model, config.data.seq_len), count_parameters(config.model)
    forward = flops.attention + flops.feed_forward + flops.attention_scores + flops.logits
    matrices = parameters.attention + parameters.feed_forward
    others = parameters.norms + parameters.embedding + parameters.output
    moved = 2 * _PARAMETER_BYTES * (matrices + others) + _update_bytes(config, matrices, others)
    return of_memory + PartCost(3 * tokens * forward, moved)


def _update_bytes(config: RunConfig, matrices: int, others: int) -> int:
    """Bytes that the optimizer moves for so many weights of matrix products and other dense parameters."""
    moments = moments_kept(config.train.optimizer, matrices, others)
    return _PARAMETER_BYTES * (UPDATE_ARRAYS * (matrices + others) + 2 * moments)


def _total(costs: Iterable[PartCost]) -> PartCost:
    return sum(costs, PartCost(0, 0))
