"""Computes the least work and traffic of a training step of one memory layer, by part, given only its config.

These are floors to compare timings with: every program needs at least this much. FLOPs are those of products
with a width, two per multiplication and addition, as in `ultramem_jax.accounting`. They leave out norms,
comparisons, addresses and the arithmetic of optimizers, including Muon's products of matrices. Bytes are
those of parameters, rows and moments that each part must read from the device's memory or write to it. They
leave out activations, including scores and gradients of rows, because these can stay in the cache. Weights
and keys can also stay there between the forward and the backward pass. What is read from rows anywhere in a
table is counted once more by itself, because it comes more slowly (`PartCost.row_bytes`). The letters are
those of the axis legend in `ultramem_jax`. In addition, P is the number of dense parameters of the layer, and
U the distinct rows of a step; T is tokens and R the reads of one token.
"""

from collections.abc import Mapping

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
"""Arrays that an update moves without its moments: it reads parameter and gradient, and writes the parameter.
Each moment is also read and written. That makes seven arrays in all with AdamW, and five with Lion."""


BESIDE_STAGES = (
    "lookup",
    "projection",
    "backward",
    "row_gradients",
    "row_update",
    "dense_optimizer",
)
"""Parts of a step that follow the addresser's stages, in the order in which they run; see
`memory_step_costs`."""


def memory_step_costs(config: RunConfig, tokens: int) -> dict[str, PartCost]:
    """Returns the cost of one training step of the model's memory, without the rest of the model, by part.

    The addresser's stages come first (`memory_parts.AddressConfig.stages`). Then follow:

    - `lookup`: FLOPs 2·T·R·d_v. Bytes: every distinct row, once.
    - `projection`: FLOPs 2·T·(its weights). Bytes: its weights.
    - `backward`: FLOPs: twice those of the projection and of the stages that are differentiated (by input
      and by weight), and once those of the lookup (by score). Bytes: the rows once more, and the gradient of
      every dense parameter: 4·P.
    - `row_gradients`: FLOPs 2·T·R·d_v: the product that each read adds to the gradient of its row, and the
      sum. No bytes, because a row is updated as soon as its gradient is complete. With dense gradients
      4·N·d_v bytes, the gradient of the whole table.
    - `row_update`: AdamW. Bytes: every distinct row and its moments, read and written. A selection updates
      only `train.slots_per_step` rows, and reads 4 bytes of the background for each row that was read. With
      dense gradients all N rows: table, gradient and two moments read, all but the gradient written,
      7·4·N·d_v.
    - `dense_optimizer`: AdamW. Bytes 7·4·P: parameter, gradient and two moments read, all but the gradient
      written.

    Args:
        config: run of a model with one memory, without pre-values and gate.
        tokens: T.

    Raises:
        UserError: another kind of model, or no tokens.
    """
    at_least(1, tokens=tokens)
    if len(config.model.sites) != 1:
        raise UserError("model.memories: the cost of a step is counted for models with one memory")
    (site,) = config.model.sites
    memory, parameters, table = site.config, site.parameters, site.config.table
    if table.pre_value_dim or "gate" in parameters:
        raise UserError("model.memories: the cost of a step is counted without pre-values and without a gate")
    stages = memory.address.stages(site)
    readout = memory.readout.parameters(site).values()
    projection = sum(parameter.size for parameter in readout)
    projection_flops = sum(parameter.flops for parameter in readout)
    rows = expected_rows(site.num_slots, tokens * memory.reads_per_token)
    of_row = row_bytes(table, config.train)
    matrices = sum(parameter.size for parameter in parameters.values() if parameter.role == "matrix")
    dense = sum(parameter.size for parameter in parameters.values())
    if config.train.table_gradient == "dense":
        gradient = site.num_slots * table.value_dim * _PARAMETER_BYTES
        update, updated = UPDATE_ARRAYS * gradient + 2 * site.num_slots * of_row.moments, 0.0
    else:
        changed = min(rows, config.train.slots_per_step or rows)
        weights = _PARAMETER_BYTES * rows if config.train.background else 0
        gradient, updated = 0, changed * of_row.total + weights
        update = round(2 * changed * of_row.total + weights)

    def cost(flops_of_token: int, moved: float = 0, of_rows: float = 0) -> PartCost:
        return PartCost(tokens * flops_of_token, round(moved), round(of_rows))

    found = {name: cost(stage.flops, _PARAMETER_BYTES * stage.weights) for name, stage in stages.items()}
    differentiated = projection_flops + sum(stage.flops for stage in stages.values() if stage.backward)
    beside = (
        cost(site.lookup_flops, rows * of_row.table, rows * of_row.table),
        cost(projection_flops, _PARAMETER_BYTES * projection),
        cost(
            2 * differentiated + site.lookup_flops,
            rows * of_row.table + _PARAMETER_BYTES * dense,
            rows * of_row.table,
        ),
        cost(site.lookup_flops, gradient),
        cost(0, update, updated),
        cost(0, _update_bytes(config, matrices, dense - matrices)),
    )
    return found | dict(zip(BESIDE_STAGES, beside, strict=True))


def model_step_cost(config: RunConfig, tokens: int) -> PartCost:
    """Returns the cost of one training step of the whole model.

    It is the cost of the memory and of three forward passes of the rest. Every parameter outside the memory
    is read, its gradient is written, and the optimizer updates it.

    Args:
        config: run of a model that `memory_step_costs` accepts, with MLPs.
        tokens: T, in sequences of length `data.seq_len`.

    Raises:
        UserError: another kind of model, or no tokens.
    """
    of_memory = total(memory_step_costs(config, tokens))
    if config.model.moe is not None:
        raise UserError("model.moe: the cost of a step is counted for models with MLPs")
    flops, parameters = flops_per_token(config.model, config.data.seq_len), count_parameters(config.model)
    forward = flops.attention + flops.feed_forward + flops.attention_scores + flops.logits
    matrices = parameters.attention + parameters.feed_forward
    others = parameters.norms + parameters.embedding + parameters.output
    moved = 2 * _PARAMETER_BYTES * (matrices + others) + _update_bytes(config, matrices, others)
    return of_memory + PartCost(3 * tokens * forward, moved)


def _update_bytes(config: RunConfig, matrices: int, others: int) -> int:
    """Returns the bytes that the optimizer moves for matrix-product weights and other dense parameters."""
    moments = moments_kept(config.train.optimizer, matrices, others)
    return _PARAMETER_BYTES * (UPDATE_ARRAYS * (matrices + others) + 2 * moments)


def total(costs: Mapping[str, PartCost]) -> PartCost:
    """Returns the cost of all parts together."""
    return sum(costs.values(), PartCost(0, 0))
