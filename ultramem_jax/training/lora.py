"""Adapts matrices by LoRA (arXiv 2106.09685): W + (α/r)·A·B, with A (D, r) and B (r, F) that learn.

The factors are the subtree `lora` of the parameters: those of the matrix `layer_1/attention/w_query` are
`lora/layer_1/attention/w_query/lora_a` and `…/lora_b`. B starts at zero, so a run starts at the model that it
adapts. A product with an adapted matrix is x·W + (x·A)·((α/r)·B): W has no gradient, and no matrix of its
size is made.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ultramem_jax.config import TrainConfig
from ultramem_jax.errors import UserError, require
from ultramem_jax.layers.parameters import NOT_CAST
from ultramem_jax.nested import at, leaves, put
from ultramem_jax.ops.linear import LowRankSum
from ultramem_jax.training.trainable import names, overlaid, selected
from ultramem_jax.tree_types import ArrayTree, Variables

LORA = "lora"
"""Name of the factors' subtree among the parameters."""
A, B = "lora_a", "lora_b"


def with_factors(params: ArrayTree, train: TrainConfig, key: jax.Array) -> ArrayTree:
    """Returns the parameters of a model with the factors of its adapted matrices, if the run has any.

    A is drawn from N(0, 1/D), B is zero.

    Args:
        params: parameters of the model, without factors.
        train: rank and targets.
        key: random key.

    Raises:
        UserError: the targets are no matrices of layers, or learn themselves.
    """
    if not train.lora_rank:
        return params
    targets = _targets(params, train)
    factors: dict[str, Any] = {}
    for number, (name, matrix) in enumerate(targets.items()):
        (width, out), rank = matrix.shape, train.lora_rank
        drawn = jax.random.normal(jax.random.fold_in(key, number), (width, rank), jnp.float32)
        pair = {A: drawn * width**-0.5, B: jnp.zeros((rank, out), jnp.float32)}
        put(factors, name.split("/"), pair)
    learns = names(selected({LORA: factors}, train.trainable))
    require(bool(learns), "train.trainable", train.trainable, "must match LoRA's factors, such as 'lora/'")
    return {**params, LORA: factors}


def _targets(params: ArrayTree, train: TrainConfig) -> dict[str, jax.Array]:
    """Returns the matrices of layers whose names match `lora_targets`, by name."""
    field, pattern = "train.lora_targets", train.lora_targets
    layers = {name: of for name, of in params.items() if name.startswith("layer_")}
    found = {"/".join(path): matrix for path, matrix in leaves(selected(layers, pattern))}
    matrices = {
        name: matrix
        for name, matrix in found.items()
        if matrix.ndim == 2 and name.rpartition("/")[2] not in NOT_CAST
    }
    example = "layer_1/attention/w_query"
    require(bool(matrices), field, pattern, f"must match matrices of layers, such as {example}")
    learning = names(selected(layers, train.trainable))
    both = next((name for name in matrices if name in learning), None)
    if both is not None:
        allowed = f"must not match {both}, which LoRA adapts; 'lora/' matches only the factors"
        raise UserError(f"train.trainable = {train.trainable!r}: {allowed}")
    return matrices


def adapted(params: ArrayTree, train: TrainConfig) -> ArrayTree:
    """Returns the parameters that a model computes with: adapted matrices are `LowRankSum`.

    Args:
        params: parameters of a run, with factors or without.
        train: gives α and the rank.
    """
    return _combined(params, lambda matrix, a, b: LowRankSum(matrix, a, _scale(train) * b))


def merged(variables: Variables, train: TrainConfig) -> dict[str, ArrayTree]:
    """Returns the variables of a run as those of a plain model: W + (α/r)·A·B in place of every W.

    Args:
        variables: `params` with factors or without, and other collections, which stay the same.
        train: gives α and the rank.
    """

    def whole(matrix: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        product = jnp.matmul(a, _scale(train) * b, precision=jax.lax.Precision.HIGHEST)
        return (matrix + product).astype(matrix.dtype)

    return {**variables, "params": _combined(variables["params"], whole)}


def _scale(train: TrainConfig) -> float:
    return train.lora_alpha / train.lora_rank


def _combined(params: ArrayTree, combine: Any) -> ArrayTree:
    if LORA not in params:
        return params
    model = {name: value for name, value in params.items() if name != LORA}
    changed: dict[str, Any] = {}
    for name in {name.rpartition("/")[0]: None for name in names(params[LORA])}:
        path = name.split("/")
        pair = at(params[LORA], path)
        put(changed, path, combine(at(model, path), pair[A], pair[B]))
    return overlaid(model, changed)
