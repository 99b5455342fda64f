"""What a training step of one memory layer must compute and move, by part, from its config alone.

These are floors, for timings to stand beside: what a program could not do without, however it is written.
FLOPs are those of products with a width, two per multiplication and addition, as in
`ultramem_jax.accounting`; norms, comparisons, addresses and the arithmetic of optimizers, Muon's products of
matrices among it, are left out. Bytes are those of parameters, rows and moments that have to come from memory
or go there, each part by itself: activations, scores and gradients of rows among them, can stay in the cache,
and so can weights and keys between the forward and the backward pass. The letters are those of the axis
legend in `ultramem_jax`; T is tokens, R the reads of one, P the dense parameters of the layer, U the
distinct rows of a step.
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
"""Parameter and gradient are read, and the parameter is written. Each moment is read and written besides:
seven arrays in all with AdamW, five with Lion."""


BESIDE_STAGES = (
    "lookup",
    "projection",
    "backward",
    "row_gradients",
    "row_update",
    "dense_optimizer",
)
"""Parts of a step behind the addresser's stages, in the order in which they run; see `memory_step_costs`."""


def memory_step_costs(config: RunConfig, tokens: int) -> dict[str, PartCost]:
    """Returns the cost of one training step of the model's memory, taken alone, by part.

    First come the addresser's stages (`memory_parts.AddressConfig.stages`); then

    - `lookup`: FLOPs 2·T·R·d_v. Bytes: every distinct row, once.
    - `projection`: FLOPs 2·T·(its weights). Bytes: its weights.
    - `backward`: FLOPs: twice those of the projection and of the stages that are differentiated (by input
      and by weight), and once those of the lookup (by score). Bytes: the rows once more, and the gradient of
      every dense parameter: 4·P.
    - `row_gradients`: FLOPs 2·T·R·d_v: what each read sends to its row, and its sum. No bytes: a row is
      updated as soon as its gradient is complete. In the dense way 4·N·d_v, the gradient of the whole table.
    - `row_update`: AdamW. Bytes: every distinct row and its moments, read and written. In the dense way all N
      rows: table, gradient and two moments read, all but the gradient written, 7·4·N·d_v.
    - `dense_optimizer`: AdamW. Bytes 7·4·P: parameter, gradient and two moments read, all but the gradient
      written.

    Args:
        config: of a model with one memory, without pre-values and gate.
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
        update = UPDATE_ARRAYS * gradient + 2 * site.num_slots * of_row.moments
    else:
        gradient, update = 0, round(2 * rows * of_row.total)

    def cost(flops_of_token: int, moved: float = 0) -> PartCost:
        return PartCost(tokens * flops_of_token, round(moved))

    found = {name: cost(stage.flops, _PARAMETER_BYTES * stage.weights) for name, stage in stages.items()}
    differentiated = projection_flops + sum(stage.flops for stage in stages.values() if stage.backward)
    beside = (
        cost(site.lookup_flops, rows * of_row.table),
        cost(projection_flops, _PARAMETER_BYTES * projection),
        cost(2 * differentiated + site.lookup_flops, rows * of_row.table + _PARAMETER_BYTES * dense),
        cost(site.lookup_flops, gradient),
        cost(0, update),
        cost(0, _update_bytes(config, matrices, dense - matrices)),
    )
    return found | dict(zip(BESIDE_STAGES, beside, strict=True))


def model_step_cost(config: RunConfig, tokens: int) -> PartCost:
    """The cost of one training step of the whole model: its memory, and three forward passes of the rest.

    Every other parameter is read, its gradient written, and updated by the optimizer.

    Args:
        config: of a model that `memory_step_costs` takes, with MLPs.
        tokens: T, in sequences of `data.seq_len`.

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
    """Bytes that the optimizer moves for so many weights of matrix products and other dense parameters."""
    moments = moments_kept(config.train.optimizer, matrices, others)
    return _PARAMETER_BYTES * (UPDATE_ARRAYS * (matrices + others) + 2 * moments)


def total(costs: Mapping[str, PartCost]) -> PartCost:
    """Returns the cost of all parts together."""
    return sum(costs.values(), PartCost(0, 0))
