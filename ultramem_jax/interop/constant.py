"""Defines an array that is a part of a tree of variables, but not one of its leaves."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, DTypeLike


@jax.tree_util.register_pytree_node_class
class Constant:
    """Holds a NumPy array as a pytree node without leaves.

    `jax.grad` refuses a tree with integer leaves. If the variables hold a permutation as a `Constant`, the
    whole tree can be differentiated, and the tree of gradients holds the same `Constant` in its place. Under
    `jax.jit` it is a part of the compiled function: other contents cause another compilation.
    """

    def __init__(self, value: ArrayLike):
        self.value = np.array(value)
        self.value.setflags(write=False)
        self._hash: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        """Returns the dtype of the array."""
        return self.value.dtype

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype=dtype, copy=copy)

    def __jax_array__(self) -> jax.Array:
        # Without x64 mode an int64 array becomes int32 here.
        return jnp.asarray(self.value)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Constant)
            and self.dtype == other.dtype
            and np.array_equal(self.value, other.value)
        )

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.shape, self.dtype.str, self.value.tobytes()))
        return self._hash

    def __repr__(self) -> str:
        return f"Constant(shape={self.shape}, dtype={self.dtype})"

    def tree_flatten(self) -> tuple[tuple[()], "Constant"]:
        """Returns no children. The node itself, compared by content, is the structure."""
        return (), self

    @classmethod
    def tree_unflatten(cls, structure: "Constant", children: tuple[()]) -> "Constant":
        """Returns the node that `tree_flatten` took apart."""
        del children
        return structure
