"""Makes the training step of one memory layer by itself: forward, backward and AdamW of everything.

The layer works as in a model, and its step includes the gradient by x. Its loss is the mean square error
against a random target. `bench_step` times it with several ways of keeping and training the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments.common.model_steps import Result, traced
from ultramem_jax.config import DataConfig, MemoryConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.errors import UserError
from ultramem_jax.models.parts import OneMemory
from ultramem_jax.presets import families
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.module_step import Metrics, ModuleStep, Objective
from ultramem_jax.training.state import TrainState, state_of
from ultramem_jax.tree_types import Variables

SEQUENCES = 2
"""Sequences in the batch of a step."""
EMBED_DIM = 256
"""D, the width of the residual stream."""


@dataclass(frozen=True)
class Way:
    """Describes how a table is kept and trained: the dtype of `TableConfig`, and fields of `TrainConfig`."""

    kernels: bool = True
    """Whether native kernels may compute. Without them XLA computes everything."""

    table_dtype: str = "float32"
    table_gradient: Literal["row_sparse", "dense"] = "row_sparse"
    row_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    row_second_moment: Literal["element", "row"] = "element"

    @property
    def is_dense(self) -> bool:
        """Tells whether the gradient has the size of the table."""
        return self.table_gradient == "dense"

    def traced(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """Returns the function, which is traced with the kernels of this way, or without."""
        return traced(function, self.kernels)


_BFLOAT16 = Way(table_dtype="bfloat16", row_moment_dtype="bfloat16", row_second_moment="row")
WAYS = {
    "native": Way(),
    "XLA": Way(kernels=False),
    "dense": Way(kernels=False, table_gradient="dense"),
    "native bf16": _BFLOAT16,
    "XLA bf16": replace(_BFLOAT16, kernels=False),
}
"""Ways that are timed, by name."""
XLA_OF = {"native": "XLA", "native bf16": "XLA bf16"}
"""Ways with kernels, and the same without."""


class Batch(NamedTuple):
    """Holds what a step of the layer is given."""

    x: jax.Array
    """Input of the layer, (B, S, D) float32."""
    target: jax.Array
    """Output that the loss compares with, (B, S, D) float32."""


def bench_memory(num_keys: int, way: Way) -> MemoryConfig:
    """Returns the memory that is timed, with n² slots."""
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
    """Returns a small language model with that memory; the layer by itself is the memory of this model.

    Args:
        num_keys: n; the table has n² slots.
        way: how the table is kept and trained.
        tokens: T of a step, in `SEQUENCES` sequences.
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
    """Trains the only memory of a model by itself; methods are pure functions of arrays, to be compiled."""

    def __init__(self, config: RunConfig):
        """Prepares the layer and its step.

        Raises:
            UserError: the model of the config has not exactly one memory.
        """
        if len(config.model.sites) != 1:
            raise UserError(f"model.memories: {len(config.model.sites)} of them, a layer by itself is one")
        (self.site,) = config.model.sites
        self.config, self.optimizers = config, make_optimizers(config)
        self.module = OneMemory(self.site)
        self.is_dense = config.train.table_gradient == "dense"
        objective = Objective(
            self._loss,
            num_tokens=lambda batch: batch.x.shape[0] * batch.x.shape[1],
            inputs=lambda batch: batch.x,
        )
        self.training = ModuleStep(config, self.optimizers, objective)

    def init(self) -> TrainState:
        """Returns the state at step 0."""
        x = jnp.zeros((1, 1, self.config.model.embed_dim), jnp.float32)
        variables = self.module.init(jax.random.key(0), x, train=True)
        return state_of(self.config, self.optimizers, variables, jnp.uint32(0))

    def draw(self, key: jax.Array, tokens: int) -> Batch:
        """Returns a random batch of unit normals."""
        shape = (SEQUENCES, tokens // SEQUENCES, self.config.model.embed_dim)
        return Batch(*(jax.random.normal(k, shape, jnp.float32) for k in jax.random.split(key)))

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        """Returns the state after one training step, and the gradient by x (B, S, D)."""
        after = self.training(state, batch)
        # The record of slots that were read belongs to a run, not to the layer: the compiler drops it.
        return after.state.replace(usage=state.usage), after.input_gradients

    def _loss(
        self, variables: Variables, x: jax.Array, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Variables, Metrics]]:
        del key  # nothing here is random
        y, sown = self.module.apply(variables, x, train=True, mutable=["reads", "losses", "buffers"])
        error = jnp.mean((y - batch.target) ** 2)
        return error + sum(jax.tree.leaves(sown["losses"])), (sown, {"loss": error})
