"""From a cell of the virtual grid to a virtual block and a physical slot (Implicit Value Expansion).

The virtual grid of K·K = E·N cells is permuted and cut into E blocks of N slots, so that every physical slot
is reached from E cells that lie in no order. The permutation is a Feistel network on (row, column): each
round adds to one coordinate a hash of the other, modulo K, which can be undone and hence is a bijection for
every K. Nothing of size E·N is stored.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.ops.hashing import mix

_ROUNDS = 4  # Luby and Rackoff: four rounds of a good hash look random even to an adversary.


def block_and_slot(
    rows: jax.Array, columns: jax.Array, num_keys: int, expansion: int
) -> tuple[jax.Array, jax.Array]:
    """The E tiles of n·n cells that the virtual grid falls into, and the slot within the tile.

    Args:
        rows: int32 in [0, √E·n), any shape.
        columns: int32 in [0, √E·n), same shape.
        num_keys: n.
        expansion: E, a square.

    Returns:
        blocks in [0, E) and slots in [0, n²), int32, same shape. One-to-one with (row, column).
    """
    side = int(np.sqrt(expansion))
    blocks = (rows // num_keys) * side + columns // num_keys
    slots = (rows % num_keys) * num_keys + columns % num_keys
    return blocks, slots


def shuffled_block_and_slot(
    rows: jax.Array, columns: jax.Array, num_keys: int, expansion: int, seed: int
) -> tuple[jax.Array, jax.Array]:
    """`block_and_slot` of the cell that the keyed shuffle sends (row, column) to; the shuffle of IVE."""
    rows, columns = keyed_shuffle(rows, columns, num_keys * int(np.sqrt(expansion)), seed)
    return block_and_slot(rows, columns, num_keys, expansion)


def permuted_block_and_slot(
    rows: jax.Array, columns: jax.Array, num_virtual_keys: int, num_slots: int, permutation: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Blocks and slots by a stored permutation, as in the authors' code.

    The address row·K + column is sent through `permutation` (E·N,) int32; block = address div N and
    slot = address mod N.
    """
    address = permutation[rows * num_virtual_keys + columns]
    return address // num_slots, address % num_slots


def windowed(slots: jax.Array, offset: int, num_slots: int) -> jax.Array:
    """The rows of a shared table that the slots of a window are: (slot + offset) mod N.

    Args:
        slots: int32 in [0, N), any shape.
        offset: first row of the window, in [0, N).
        num_slots: N, at most 2**31 - 1; no sum here exceeds it.
    """
    before_the_end = num_slots - offset
    return jnp.where(slots < before_the_end, slots + offset, slots - before_the_end)


def keyed_shuffle(
    rows: jax.Array, columns: jax.Array, num_virtual_keys: int, seed: int
) -> tuple[jax.Array, jax.Array]:
    """A bijection of the K·K grid onto itself, computed on the fly.

    Args:
        rows: int32 in [0, K), any shape.
        columns: int32 in [0, K), same shape.
        num_virtual_keys: K, any positive integer.
        seed: which bijection.

    Returns:
        Rows and columns, int32, same shape.
    """
    keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint32)
    left, right = rows.astype(jnp.uint32), columns.astype(jnp.uint32)
    modulus = jnp.uint32(num_virtual_keys)
    for key in keys:
        left, right = right, (left + mix(right, key) % modulus) % modulus
    return left.astype(jnp.int32), right.astype(jnp.int32)
