"""Maps cells of the virtual grid to virtual blocks and physical slots: Implicit Value Expansion (IVE).

IVE permutes the virtual grid of K·K = E·N cells and cuts it into E blocks of N slots. Every physical slot is
then reached from E cells that lie in no order. The permutation is a Feistel network on (row, column): each
round adds to one coordinate a hash of the other, modulo K. A round can be undone, so the permutation is a
bijection for every K. Nothing of size E·N is stored.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.ops.hashing import mix

_ROUNDS = 4  # Luby and Rackoff: four rounds of a good hash look random even to an adversary.


def block_and_slot(
    rows: jax.Array, columns: jax.Array, num_keys: int, expansion: int
) -> tuple[jax.Array, jax.Array]:
    """Cuts the virtual grid into E blocks of n·n cells, and returns each cell's block and slot.

    Args:
        rows: int32 in [0, √E·n), any shape.
        columns: int32 in [0, √E·n), same shape.
        num_keys: n.
        expansion: E, a square number.

    Returns:
        blocks in [0, E) and slots in [0, n²), int32, same shape. The pairs are one-to-one with (row, column).
    """
    side = int(np.sqrt(expansion))
    blocks = (rows // num_keys) * side + columns // num_keys
    slots = (rows % num_keys) * num_keys + columns % num_keys
    return blocks, slots


def shuffled_block_and_slot(
    rows: jax.Array, columns: jax.Array, num_keys: int, expansion: int, seed: int
) -> tuple[jax.Array, jax.Array]:
    """Returns `block_and_slot` of the cell that IVE's shuffle, `keyed_shuffle`, maps (row, column) to."""
    rows, columns = keyed_shuffle(rows, columns, num_keys * int(np.sqrt(expansion)), seed)
    return block_and_slot(rows, columns, num_keys, expansion)


def permuted_block_and_slot(
    rows: jax.Array, columns: jax.Array, num_virtual_keys: int, num_slots: int, permutation: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns blocks and slots by a stored permutation, as in the authors' code.

    `permutation` (E·N,) int32 maps row·K + column to an address. The block is the address div N, the slot
    the address mod N.

    Args:
        rows: int32 in [0, K), any shape.
        columns: int32 in [0, K), same shape.
        num_virtual_keys: K.
        num_slots: N.
        permutation: (E·N,) int32.
    """
    address = permutation[rows * num_virtual_keys + columns]
    return address // num_slots, address % num_slots


def windowed(slots: jax.Array, offset: int, num_slots: int) -> jax.Array:
    """Returns the rows of a shared table that a window's slots stand for: (slot + offset) mod N.

    Args:
        slots: int32 in [0, N), any shape.
        offset: first row of the window, in [0, N).
        num_slots: N, at most 2**31 - 1. No sum here exceeds it.
    """
    before_the_end = num_slots - offset
    return jnp.where(slots < before_the_end, slots + offset, slots - before_the_end)


def keyed_shuffle(
    rows: jax.Array, columns: jax.Array, num_virtual_keys: int, seed: int
) -> tuple[jax.Array, jax.Array]:
    """Permutes the K·K grid by a keyed bijection that is computed on the fly.

    Args:
        rows: int32 in [0, K), any shape.
        columns: int32 in [0, K), same shape.
        num_virtual_keys: K, any positive integer.
        seed: chooses the bijection.

    Returns:
        Rows and columns, int32, same shape.
    """
    keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint32)
    left, right = rows.astype(jnp.uint32), columns.astype(jnp.uint32)
    modulus = jnp.uint32(num_virtual_keys)
    for key in keys:
        left, right = right, (left + mix(right, key) % modulus) % modulus
    return left.astype(jnp.int32), right.astype(jnp.int32)
