"""How layers come by their matrices: declared for training, or as `models.serving` has prepared them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


def matrix(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Any:
    """The parameter `name` of the module: float32 of that shape, or what stands in its place.

    A model that is served has other things there than arrays of the declared shape: `OutputMajor`,
    `ServedKeys`, or a tuple with an entry for each expert. Which it is, is the layer's to know.
    """
    served = served_parameter(module, name)
    return module.param(name, init, shape, jnp.float32) if served is None else served


def served_parameter(module: nn.Module, name: str) -> Any:
    """What has been prepared in place of the parameter `name`; None if it is an ordinary one."""
    held: Any = module.get_variable("params", name)
    return None if held is None or hasattr(held, "dtype") else held
