"""Compiles and runs training steps on a mesh, for the tests of their numbers and of what they send."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from tests.support.drawn import drawn_state
from tests.support.step_models import FAMILY, MODEL, ULTRAMEM, token_batches
from ultramem_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from ultramem_jax.ops.exchanges import compiled_with_names
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes, one_device, shard_batch
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.state import abstract_state
from ultramem_jax.training.step import make_train_step

TRAIN = TrainConfig(steps=20, batch_size=8, learning_rate=1e-2, warmup_fraction=0.0)
MEMORY = ULTRAMEM.memory.changed(placement="1:1")
V2 = FAMILY["ultramem-v2"].changed(num_keys=4, value_dim=8)  # a ring of 32 slots, pre-values, GELU, balance
TWO_AXES = MeshConfig(data=2, memory=2, width=2)


def run_config(memory, mesh, train=TRAIN):
    """Returns the run of a model with one layer, or with two where they share a table."""
    layers = 2 if memory.table.is_shared else 1
    return RunConfig(
        replace(MODEL, num_layers=layers, memories={"memory": memory}), DataConfig(seq_len=16), train, mesh
    )


BOTH = run_config(MEMORY.changed(partition="both"), TWO_AXES)
SAME_TOKENS = replace(BOTH, mesh=replace(TWO_AXES, batch_over_memory=False))
MICRO_BATCHES = run_config(
    V2.changed(partition="both"), TWO_AXES, replace(TRAIN, grad_accumulation=2, batch_size=16)
)


class Compiled(NamedTuple):
    """Holds a step for the mesh of its config, as `training.loop` compiles it."""

    step: Any
    abstract: Any
    axes: MeshAxes


def lowered(config, alone=False):
    """Returns the step before it is compiled, its state's shapes, and the axes."""
    axes = one_device() if alone else mesh_axes(config, make_mesh(config.mesh))
    optimizers = make_optimizers(config)
    abstract = abstract_state(config, optimizers, axes)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    shape = config.train.batch_size, config.data.seq_len + 1
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=axes.sharding(P(axes.tokens)))
    step = jax.jit(
        make_train_step(config, optimizers, axes=axes),
        donate_argnums=0,
        out_shardings=(shardings, axes.sharding()),
    )
    return step.lower(abstract, tokens), abstract, axes


@functools.cache
def compiled(config, alone=False):
    step, abstract, axes = lowered(config, alone)
    with compiled_with_names():
        return Compiled(step.compile(), abstract, axes)


@functools.cache
def start(model, train):
    """Returns a state at step 0, drawn and not initialised."""
    return jax.tree.map(np.asarray, drawn_state(RunConfig(model, train=train)))


def run(config, steps, alone=False):
    """Returns state, losses and last metrics after some steps from the seed 0."""
    return after_steps(config, compiled(config, alone), steps)


def after_steps(config, of_step, steps):
    """Returns what `run` returns, by a step that is `Compiled`."""
    step, abstract, axes = of_step
    model = config.model
    if model.memories:
        model = replace(model, memories={"memory": model.memory.changed(partition="slots")})
    state = jax.device_put(start(model, config.train), jax.tree.map(lambda a: a.sharding, abstract))
    losses = []
    for tokens in token_batches(steps, config.train.batch_size, config.data.seq_len + 1):
        state, metrics = step(state, shard_batch(np.asarray(tokens), axes))
        losses.append(float(metrics["loss"]))
    return state, losses, metrics
