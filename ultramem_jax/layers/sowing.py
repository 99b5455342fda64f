"""What layers leave beside their output: losses, metrics, reads."""

from typing import Any

import flax.linen as nn
import jax


def sow(module: nn.Module, collection: str, name: str, value: jax.Array) -> None:
    """Leaves `value` under `name`, where the caller of `apply` has made `collection` mutable.

    Unlike Flax's own, it keeps the value itself instead of a tuple, and nothing at initialisation: the
    variables that `init` returns are those that `apply` takes.
    """
    if not module.is_initializing():
        module.sow(collection, name, value, reduce_fn=_newest, init_fn=lambda: None)


def _newest(_: Any, value: jax.Array) -> jax.Array:
    return value
