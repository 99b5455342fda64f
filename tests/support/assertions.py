"""Holds the comparisons that chex does not have, and that of an error."""

from collections.abc import Callable

import chex
import jax
import numpy as np
import pytest

from ultramem_jax.errors import UserError


def refused(call: Callable[[], object], *said: str) -> str:
    """Returns the one line with which `call` refuses its input, and asserts what is in it."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert all(words in message for words in said) and "\n" not in message, message
    return message


def assert_same_bits(actual: chex.ArrayTree, expected: chex.ArrayTree) -> None:
    """Asserts that a tree of JAX arrays holds the bits of another, NaNs and signs of zero included."""
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(actual))
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal_comparator(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
        lambda a, b: f"{a} has other bits than {b}",
        actual,
        expected,
    )


def assert_close_by_size(actual: chex.Array, expected: chex.Array, name: str) -> None:
    """Asserts that an array is within 1e-5 of the size of the entries; what is zero must be zero.

    Size is the root mean square: for arrays that scatter about zero the standard deviation, but also defined
    for the single number that is the gradient of a core of rank one.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    chex.assert_equal_shape([actual, expected], custom_message=name)
    assert np.abs(actual - expected).max() <= 1e-5 * np.sqrt(np.mean(expected**2)), name
