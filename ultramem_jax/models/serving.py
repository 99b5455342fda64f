"""Prepares the variables of a model for decoding: what depends only on parameters is computed once.

A training step may norm all keys, because a thousand tokens use them. A decoding step has one token per
sequence, and ends when the weights have been read. So nothing is left in it that could be done before.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.errors import require
from ultramem_jax.layers.experts import PaddedExperts
from ultramem_jax.layers.parameters import NOT_CAST
from ultramem_jax.ops.linear import OutputMajor
from ultramem_jax.platforms import platform
from ultramem_jax.tree_types import ArrayTree


def prepare_for_decoding(config: ModelConfig, variables: dict[str, ArrayTree]) -> dict[str, ArrayTree]:
    """Returns the variables that `Transformer(config)` decodes with.

    The results are the same up to the rounding of sums.

    - Matrices are in the dtype of the computation and kept by output (`OutputMajor`). On CPU each expert is
      kept by itself, on TPU all are padded (`PaddedExperts`). In bfloat16 half the bytes are read.
    - What depends only on a memory's parameters is computed, as its addresser says: product keys are normed,
      and the singular vectors u and t of the Tucker cores are found (`ServedKeys`).
    - Tables stay the same arrays. A step only reads rows of a table.

    The result cannot be trained, is not supported on a mesh, and shares with the input what was not changed.
    Drop the given variables to free the rest.

    Args:
        config: the model's config.
        variables: `params`, `memory` and `buffers`, as `training.restore.load_model` returns them. Variables
            that are prepared already are returned as they are.

    Raises:
        UserError: they lie on several devices.
    """
    params = dict(variables["params"])
    if isinstance(params.get("output"), OutputMajor):  # every prepared model has one
        return variables
    _check_on_one_device(variables)
    dtype = jnp.dtype(config.dtype)
    served = {name: value for name, value in params.items() if not isinstance(value, dict)}
    # The rows that tokens look up and the tied matrix of the logits are one array.
    served["embedding"] = jnp.asarray(params["embedding"], dtype)
    if config.tie_embeddings:
        served["output"] = OutputMajor(served["embedding"])
    else:
        served["output"] = _matrix(params["output"], dtype)
    one_by_one = config.moe is not None and config.moe.implementation == "auto" and platform() == "cpu"
    sites = {site.name: site for site in config.sites}
    buffers = variables.get("buffers", {})
    for name, layer in params.items():
        if name in sites:
            served[name] = _served_memory(sites[name], layer, buffers.get(name, {}), dtype)
        elif isinstance(layer, dict):
            served[name] = _served(layer, dtype, one_by_one)
    return variables | {"params": served}


def _check_on_one_device(variables: dict[str, ArrayTree]) -> None:
    arrays = [leaf for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array)]
    shardings = [array.sharding for array in arrays if not isinstance(array, jax.core.Tracer)]
    count = len({device for sharding in shardings for device in sharding.device_set})
    allowed = "must be on one, as training.restore.load_model has them"
    require(count <= 1, "variables", f"on {count} devices", allowed)


def _served(layer: Mapping[str, ArrayTree], dtype: jnp.dtype, one_by_one: bool) -> dict[str, ArrayTree]:
    """Returns the served parameters of a layer and of the layers in it.

    Experts are `one_by_one` or stacked as before.
    """
    served: dict[str, ArrayTree] = {}
    for name, value in layer.items():
        if isinstance(value, dict):
            served[name] = _served(value, dtype, one_by_one)
        elif value.ndim == 3:
            served[name] = _experts(name, value.astype(dtype), one_by_one)
        elif value.ndim == 2 and name not in NOT_CAST:
            served[name] = _matrix(value, dtype)
        else:
            served[name] = value
    return served


def _experts(name: str, weights: jax.Array, one_by_one: bool) -> ArrayTree:
    if one_by_one:
        return tuple(_matrix(of_one, weights.dtype) for of_one in weights)
    if platform() == "tpu":
        return PaddedExperts.of(weights, axis=1 if name == "w_out" else 2)
    return weights


def _matrix(weights: jax.Array, dtype: jnp.dtype) -> OutputMajor:
    return OutputMajor(weights.astype(dtype).T)


def _served_memory(
    site: MemorySite, params: dict[str, jax.Array], buffers: dict[str, jax.Array], dtype: jnp.dtype
) -> dict[str, ArrayTree]:
    """Returns the served parameters of a memory: its matrices, and what its addresser makes of the others."""
    known = site.parameters
    matrices = {name: _matrix(w, dtype) for name, w in params.items() if known[name].role == "matrix"}
    return params | matrices | site.config.address.served(site, params, buffers)
