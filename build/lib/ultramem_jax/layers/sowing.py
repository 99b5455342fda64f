"""Records what layers produce beside their output: losses, metrics, reads."""

import flax.linen as nn
import jax


def sow(module: nn.Module, collection: str, name: str, value: jax.Array) -> None:
    """Stores `value` under `name`, if the caller of `apply` has made `collection` mutable.

    Unlike `nn.Module.sow`, it stores the value itself instead of a tuple, and stores nothing at
    initialisation: the variables that `init` returns are those that `apply` takes.
    """
    if not module.is_initializing():
        module.sow(collection, name, value, reduce_fn=_newest, init_fn=lambda: None)


def _newest(_: object, value: jax.Array) -> jax.Array:
    return value
