"""Gives layers their matrices: declared for training, or as `models.serving` has prepared them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

NOT_CAST = ("router",)
"""Two-dimensional parameters of layers that are not multiplied in the computation's dtype."""


def matrix(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Any:
    """Returns the parameter `name` of the module, float32 of that shape, or what serving put in its place.

    A served model holds other objects than arrays of the declared shape: `OutputMajor`, `ServedKeys`, or a
    tuple with an entry for each expert. The layer must know which one it can get.
    """
    served = served_parameter(module, name)
    return module.param(name, init, shape, jnp.float32) if served is None else served


def served_parameter(module: nn.Module, name: str) -> Any:
    """Returns what serving put in place of the parameter `name`; None if it is an ordinary one."""
    held: object = module.get_variable("params", name)
    return None if held is None or hasattr(held, "dtype") else held
