"""Makes the training steps of whole models that benchmarks time, with native kernels or without."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from experiments.common.timing import Contender, contender
from ultramem_jax.config import RunConfig
from ultramem_jax.kernels import native
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.state import init_state
from ultramem_jax.training.step import make_train_step
from ultramem_jax.tree_types import ArrayTree

Result = TypeVar("Result")
"""A pytree of arrays."""


def traced(function: Callable[..., Result], kernels: bool) -> Callable[..., Result]:
    """Returns the function, which is traced with native kernels, or without."""

    def as_here(*arguments: ArrayTree) -> Result:
        with contextlib.nullcontext() if kernels else native.turned_off():
            return function(*arguments)

    return as_here


def model_contender(config: RunConfig, *, kernels: bool, dense: bool = False) -> Contender:
    """Returns the training step of a model.

    Args:
        config: the run whose step it is.
        kernels: whether native kernels may compute.
        dense: whether the step makes a gradient of the size of the tables.
    """
    optimizers = make_optimizers(config)
    step = traced(make_train_step(config, optimizers), kernels)
    return contender(lambda: init_state(config, optimizers), step, lambda state: state.tables, dense=dense)


def draw_tokens(config: RunConfig) -> Callable[[int], jax.Array]:
    """Returns a function from a number to a batch (B, S + 1) int32 of random ids."""
    shape, vocabulary = (config.train.batch_size, config.data.seq_len + 1), config.model.vocab_size

    def draw(number: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(1), number)
        return jax.random.randint(key, shape, 0, vocabulary, jnp.int32)

    return jax.jit(draw)
