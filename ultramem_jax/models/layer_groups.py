"""Runs groups of equal layers as one: a scan over their stacked parameters, with or without remat.

The compiler sees one layer of a group, so that its time does not grow with depth. The parameters stay those
of the single layers, by the same names. So a checkpoint has one form, and a run may switch scans on or off.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import layer_name
from ultramem_jax.errors import require
from ultramem_jax.layers.parameters import NOT_CAST
from ultramem_jax.models.block import Block
from ultramem_jax.ops.on_mesh import constrain_tokens
from ultramem_jax.tree_types import ArrayTree

_POLICIES = {
    "layers": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""Policy of the activations that a layer keeps for its backward pass, by `TrainConfig.remat`."""
_SOWN = ("losses", "metrics")
"""Collections that a layer sows into."""


def run_group(
    module: nn.Module, config: ModelConfig, layers: range, x: jax.Array, train: bool, remat: str
) -> tuple[jax.Array, jax.Array]:
    """Applies a group of layers to x (B, S, D) -> x after the last one, and its h.

    The layers' parameters must exist. What the layers sow gets the names that it has without a scan. Dropout
    draws other numbers than without one.

    Args:
        module: the model, which holds the layers' parameters and random numbers.
        config: the model's config.
        layers: one of `ModelConfig.layer_groups`.
        x: (B, S, D), the residual stream.
        train: whether dropout is on.
        remat: `TrainConfig.remat`.
    """
    params = [
        _cast(module.variables["params"][layer_name(layer)], jnp.dtype(config.dtype)) for layer in layers
    ]
    block = Block(config, layers[0] in config.feed_forward_layers, parent=None)
    keys = None
    if train and config.dropout:
        keys = jax.random.split(module.make_rng("dropout"), len(layers))

    def one(x: jax.Array, params: ArrayTree, key: jax.Array | None) -> tuple[jax.Array, jax.Array, ArrayTree]:
        rngs = {} if key is None else {"dropout": key}
        found: Any = block.apply({"params": params}, x, train=train, rngs=rngs, mutable=_SOWN)
        (x, h), sown = found
        return constrain_tokens(x), h, sown

    if remat != "none":
        one = jax.checkpoint(one, policy=_POLICIES[remat], prevent_cse=len(layers) == 1)
    if len(layers) == 1:
        x, h, sown = one(x, params[0], None if keys is None else keys[0])
        _put(module, layers[0], sown)
        return x, h

    def body(
        carry: tuple[jax.Array, jax.Array], layer: tuple[ArrayTree, jax.Array | None]
    ) -> tuple[tuple[jax.Array, jax.Array], ArrayTree]:
        x, h, sown = one(carry[0], *layer)
        return (x, h), sown

    alike = len({jax.tree.structure(of) for of in params}) == 1
    adapts = "must be False while train.lora_targets adapts matrices of only some layers"
    require(alike, "model.scan_layers", config.scan_layers, adapts)
    stacked = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *params)
    start = x, jnp.zeros(x.shape, config.dtype)
    (x, h), sown = jax.lax.scan(body, start, (stacked, keys))
    for number, layer in enumerate(layers):
        _put(module, layer, jax.tree.map(lambda a, number=number: a[number], sown))
    return x, h


def _cast(params: ArrayTree, dtype: jnp.dtype) -> ArrayTree:
    """Returns the parameters of a layer with the weights of products in the dtype of the computation.

    The layer would cast them itself. Cast before, the stacked copy has half the bytes. Experts' weights, of
    three axes, stay as they are: the sums of their gradients over groups of rows are float32.
    """

    def cast(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
        return array if array.ndim != 2 or _is_any_of(NOT_CAST, path) else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _is_any_of(names: tuple[str, ...], path: tuple[Any, ...]) -> bool:
    """Tells whether a leaf is a parameter of one of the names, and not a part of an adapted matrix."""
    return isinstance(path[-1], jax.tree_util.DictKey) and path[-1].key in names


def _put(module: nn.Module, layer: int, sown: ArrayTree) -> None:
    for collection, values in sown.items():
        if module.is_mutable_collection(collection):
            module.put_variable(collection, layer_name(layer), values)
