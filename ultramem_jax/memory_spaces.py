"""Tells in which memory of a device an array lies."""

import jax


def is_on_host(array: jax.Array) -> bool:
    """Tells whether an array, in a function that is being traced, is in an accelerator's host memory."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host
