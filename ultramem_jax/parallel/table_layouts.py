"""Keeps every row of a table in one piece on TPUs.

A TPU pads the last axis of an array to a multiple of 128. So it keeps a table (N, d) whose width is no such
multiple by columns, with N as the last axis. But rows are gathered and scattered in one piece: each program
would copy the whole table before and after (an audit of `ultramem-v2-227m`, d 192: 5.4 GB in every decoding
step). So the layout of such a table is named wherever a program begins or ends. It takes the padding.
"""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from ultramem_jax.platforms import LANES, platform
from ultramem_jax.tree_types import ArrayTree


def by_rows(shape: tuple[int, ...], sharding: Sharding) -> Sharding | Format:
    """Returns the sharding of a table or of its moments, with a layout where the device would choose another.

    Args:
        shape: shape of the whole array.
        sharding: how it is split, and in which memory it lies.
    """
    if platform() != "tpu" or len(shape) < 2 or sharding.memory_kind == "pinned_host":
        return sharding
    if sharding.shard_shape(shape)[-1] % LANES == 0:
        return sharding
    return Format(Layout(tuple(range(len(shape)))), sharding)


def placements(abstract: ArrayTree) -> ArrayTree:
    """Returns the sharding of every leaf, a `ShapeDtypeStruct`, or its format where that has a layout."""
    return jax.tree.map(placement, abstract)


def placement(leaf: Any) -> Any:
    """Returns the sharding of a leaf, a `ShapeDtypeStruct`, or its format if that has a layout."""
    return leaf.sharding if leaf.format.layout is None else leaf.format


def laid_out(array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns the array in the layout of its leaf; the same one if it has that."""
    wanted, held = leaf.format.layout, array.format.layout  # type: ignore[attr-defined]
    if wanted is None or held.major_to_minor == wanted.major_to_minor:
        return array
    return jax.device_put(array, leaf.format)
