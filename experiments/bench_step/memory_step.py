"""One memory layer and its training step, alone: forward, backward and AdamW of everything.

The layer stands as in a model, with its gradient by x, but for what surrounds it: its loss is the mean square
against a random target. `bench_step` times it in several ways of keeping and training the table.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.config import DataConfig, MemoryConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.errors import UserError
from ultramem_jax.layers import Memory
from ultramem_jax.ops.hashing import mix
from ultramem_jax.ops.lookup import RowGradients, row_gradients, rows_read
from ultramem_jax.presets import families
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.table_gradients import rows_if

SEQUENCES = 2
"""Sequences of a step."""
EMBED_DIM = 256
"""D."""


@dataclass(frozen=True)
class Way:
    """How a table is kept and trained: the dtype of `TableConfig`, and fields of `TrainConfig`."""

    table_dtype: str = "float32"
    table_gradient: Literal["row_sparse", "dense"] = "row_sparse"
    row_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    row_second_moment: Literal["element", "row"] = "element"


WAYS = {
    "row_sparse": Way(),
    "row_sparse bf16": Way("bfloat16", "row_sparse", "bfloat16", "row"),
    "dense": Way(table_gradient="dense"),
}


class Batch(NamedTuple):
    """What a step of the layer is given."""

    x: jax.Array
    """(B, S, D)."""
    target: jax.Array
    """(B, S, D)."""


class MemoryState(NamedTuple):
    """Everything that a step changes.

    To be donated. The arrays leave a step in the order in which they came: the compiler pairs donated buffers
    of one shape in that order, and would copy tables that change places. So it is for the parts of a step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    table: jax.Array
    table_state: Any
    buffers: Any


def bench_memory(num_keys: int, way: Way) -> MemoryConfig:
    """The memory that is timed, with n² slots."""
    return families.ultramem(
        placement="2:3",
        num_keys=num_keys,
        top_m=32,
        num_heads=2,
        key_dim=64,
        value_dim=128,
        expansion=4,
        tucker_rank=2,
        num_cores=2,
        dtype=way.table_dtype,
    )


def bench_config(num_keys: int, way: Way, tokens: int) -> RunConfig:
    """A small language model with that memory; the layer alone is the memory of this model.

    Args:
        num_keys: n; the table has n² slots.
        way: of keeping and training the table.
        tokens: of a step, in `SEQUENCES` sequences.
    """
    return RunConfig(
        model=ModelConfig(
            embed_dim=EMBED_DIM,
            num_layers=4,
            mlp_dim=4 * EMBED_DIM,
            memories={"ultramem": bench_memory(num_keys, way)},
        ),
        data=DataConfig(seq_len=tokens // SEQUENCES),
        train=TrainConfig(
            batch_size=SEQUENCES,
            table_gradient=way.table_gradient,
            row_moment_dtype=way.row_moment_dtype,
            row_second_moment=way.row_second_moment,
        ),
    )


class MemoryLayer:
    """The memory of a model, taken alone. Methods are pure functions of arrays, to be compiled."""

    def __init__(self, config: RunConfig):
        if len(config.model.sites) != 1:
            raise UserError(f"model.memories: {len(config.model.sites)} of them, a layer alone is one")
        (site,) = config.model.sites
        self.memory, self.num_slots = site.config, site.num_slots
        self.embed_dim = config.model.embed_dim
        self.module = Memory(site)
        self.optimizers = make_optimizers(config)
        self._rows = self.optimizers.rows[site.table]
        self.is_dense = config.train.table_gradient == "dense"

    def init(self) -> MemoryState:
        """The state at step 0."""
        x = jnp.zeros((1, 1, self.embed_dim), jnp.float32)
        variables = self.module.init(jax.random.key(0), x, train=True)
        params, table = variables["params"], variables["memory"]["values"]
        return MemoryState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizers.params.init(params),
            table=table,
            table_state=(self.optimizers.tables if self.is_dense else self._rows).init(table),
            buffers=variables["buffers"],
        )

    def draw(self, key: jax.Array, tokens: int) -> Batch:
        """A random batch of unit normals."""
        shape = (SEQUENCES, tokens // SEQUENCES, self.embed_dim)
        return Batch(*(jax.random.normal(k, shape, jnp.float32) for k in jax.random.split(key)))

    def step(self, state: MemoryState, batch: Batch) -> tuple[MemoryState, jax.Array]:
        """One training step: the state after it, and the gradient by x (B, S, D)."""
        gradients, (reads, buffers) = self.gradients(state, batch)
        params, opt_state = self.update_params(gradients["params"], state.params, state.opt_state)
        if self.is_dense:
            change, table_state = self.optimizers.tables.update(
                gradients["table"], state.table_state, state.table
            )
            table = optax.apply_updates(state.table, change)
        else:
            norm = optax.tree.norm([gradients["params"], gradients["x"]])
            rows = self.row_gradients(reads, gradients["pooled"], jnp.isfinite(norm))
            table, table_state = self.update_rows(rows, state.table, state.table_state, state.step)
        after = MemoryState(state.step + 1, params, opt_state, table, table_state, buffers)
        return after, gradients["x"]

    def forward(self, differentiated: Any, state: MemoryState, batch: Batch) -> tuple[jax.Array, Any]:
        """The loss, and what was read and the buffers after it.

        Args:
            differentiated: `params`, `x`, and `table` in the dense way or else `pooled`, the zeros that
                perturb the pooled reads.
            state: what is not differentiated.
            batch: its target.
        """
        variables = {
            "params": differentiated["params"],
            "memory": {"values": differentiated.get("table", state.table)},
            "buffers": state.buffers,
        }
        if "pooled" in differentiated:
            variables["perturbations"] = {"pooled": differentiated["pooled"]}
        y, left = self.module.apply(
            variables, differentiated["x"], train=True, mutable=["reads", "losses", "buffers"]
        )
        loss = jnp.mean((y - batch.target) ** 2) + sum(jax.tree.leaves(left["losses"]))
        return loss, (left["reads"], left["buffers"])

    def at(self, state: MemoryState, batch: Batch) -> dict[str, Any]:
        """The point at which `forward` is differentiated."""
        point = {"params": state.params, "x": batch.x}
        if self.is_dense:
            return point | {"table": state.table}
        tokens = batch.x.shape[0] * batch.x.shape[1]
        return point | {"pooled": jnp.zeros((tokens, self.memory.num_blocks, self.memory.table.value_dim))}

    def gradients(self, state: MemoryState, batch: Batch) -> tuple[dict[str, Any], Any]:
        """The gradient by everything in `at`, and what `forward` left."""
        return jax.grad(self.forward, has_aux=True)(self.at(state, batch), state, batch)

    def row_gradients(self, reads: Any, cotangent: jax.Array, finite: jax.Array) -> RowGradients:
        """The gradient of the rows that were read, from that of the pooled reads; of none unless `finite`."""
        rows = rows_if(finite, rows_read(reads["slots"], self.num_slots))
        return row_gradients(rows, reads["blocks"], reads["weights"], cotangent)

    def update_rows(
        self, gradients: RowGradients, table: jax.Array, moments: Any, step: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Table and moments after row-sparse AdamW."""
        seed = mix(step.astype(jnp.uint32), jnp.uint32(0))
        table, moments, *_ = self._rows.update(gradients, moments, table, step, seed)
        return table, moments

    def update_params(self, gradients: Any, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """Dense parameters and their moments after AdamW."""
        updates, opt_state = self.optimizers.params.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state
