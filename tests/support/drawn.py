"""Draws variables and states, where compiling an initialisation would take as long as compiling a layer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig, RunConfig
from ultramem_jax.models import Transformer
from ultramem_jax.ops.rows import to_stored
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.state import TrainState, state_of

COLLECTIONS = ("params", "memory", "buffers")


def drawn_variables(init: Callable[[], dict], seed: int = 0) -> dict:
    """Returns variables with the shapes that `init` makes, and random values of about the size of its own.

    Gains are ones and biases zeros, as they start; a query convolution starts as the identity. Buffers are
    ones, but for permutations.
    """
    return _drawn_like(jax.eval_shape(init), seed)


def _drawn_like(shapes: dict, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    held = {name: dict(shapes[name]) for name in COLLECTIONS if name in shapes}
    return jax.tree.map_with_path(lambda path, leaf: _drawn(path, leaf, rng), held)


def variables_of(model: ModelConfig, seed: int = 0) -> dict:
    """Returns random variables of a model; see `drawn_variables`."""
    return _drawn_like(_shapes(model), seed)


@functools.cache
def _shapes(model: ModelConfig) -> dict:
    tokens = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(lambda: Transformer(model).init(jax.random.key(0), tokens))


def drawn_state(config: RunConfig) -> TrainState:
    """Returns a state at step 0 on the first device, with `variables_of` its model."""
    variables = variables_of(config.model, config.train.seed)
    state = state_of(config, make_optimizers(config), variables, jnp.uint32(config.train.seed))
    rng = np.random.default_rng(config.train.seed)
    drawn = {name: rng.uniform(0, 3, of.shape).astype(np.float32) for name, of in state.background.items()}
    return state.replace(background=jax.tree.map(jnp.asarray, drawn))


def _drawn(path: tuple, leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    collection, name = path[0].key, path[-1].key
    shape = leaf.shape
    if name == "permutation":
        return jnp.asarray(rng.permutation(shape[0]), leaf.dtype)
    if name.endswith("scale") or collection == "buffers":
        values = np.ones(shape)
    elif name.endswith("bias"):
        values = np.zeros(shape)
    elif name == "query_conv":
        values = np.zeros(shape)
        values[0] = 1
    elif name == "cores":
        values = rng.uniform(0, 1, shape)
    elif collection == "memory":
        values = 0.1 * rng.normal(size=shape)
    else:
        fan_in = shape[-1 if name == "embedding" or len(shape) < 2 else -2]
        values = rng.normal(size=shape) / np.sqrt(fan_in)
    values = jnp.asarray(values, jnp.float32)
    return to_stored(values, leaf.dtype) if collection == "memory" else values.astype(leaf.dtype)
