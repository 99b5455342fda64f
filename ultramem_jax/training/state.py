"""Everything that changes during training, as one tree: what a checkpoint holds."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ultramem_jax.config import RunConfig
from ultramem_jax.models import Transformer
from ultramem_jax.training.optimizer import Optimizers
from ultramem_jax.training.slot_usage import init_usage


class TrainState(flax.struct.PyTreeNode):
    """The state of a run between two steps."""

    step: jax.Array
    """() int32, steps done."""
    params: Any
    """Dense parameters."""
    opt_state: Any
    tables: Any
    """The `memory` collection: per table `values` (N, d_v) and, if any, `pre_values` (N, d_p)."""
    table_state: Any
    """Moments of the tables: `RowMoments` per array of a table, or optax's state in the dense way."""
    usage: Any
    """`SlotUsage` per table."""
    buffers: Any
    """The `buffers` collection: last rank-1 vectors, stored permutations."""
    seed: jax.Array
    """() uint32; with the step, it determines every random number of the run."""


def init_state(config: RunConfig, optimizers: Optimizers, seed: jax.Array | None = None) -> TrainState:
    """The state at step 0. Traceable: compile it, or ask `jax.eval_shape` for its shapes.

    Args:
        config: of the run.
        optimizers: of `make_optimizers`.
        seed: () uint32; `train.seed` if None.
    """
    seed = jnp.asarray(config.train.seed, jnp.uint32) if seed is None else seed
    model = Transformer(config.model)
    tokens = jnp.zeros((1, 2), jnp.int32)
    variables = model.init(jax.random.key(seed), tokens)
    params, tables = variables["params"], variables.get("memory", {})
    if config.train.table_gradient == "dense":
        table_state: Any = optimizers.tables.init(tables)
    else:
        table_state = {
            name: {part: optimizers.rows.init(rows) for part, rows in table.items()}
            for name, table in tables.items()
        }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizers.params.init(params),
        tables=tables,
        table_state=table_state,
        usage={name: init_usage(table["values"].shape[0]) for name, table in tables.items()},
        buffers=variables.get("buffers", {}),
        seed=seed,
    )


def model_variables(state: TrainState) -> dict[str, Any]:
    """The variables that `Transformer.apply` takes."""
    return {"params": state.params, "memory": state.tables, "buffers": state.buffers}
