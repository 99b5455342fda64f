"""Declares what an addresser returns: which rows every token reads, and with which weights."""

from typing import NamedTuple

import jax


class Reads(NamedTuple):
    """Holds the R reads of every token.

    An addresser is a Flax module `(h, token_ids, chunk) -> Reads`:

    - h (B, S, D) is the hidden state that the memory gets from the model;
    - token_ids (B, S) int32 are the token ids at these positions, or None if the caller has none;
    - chunk, only in decoding, describes how they continue what the addresser keeps in the collection `cache`.

    Its parameters are those that its config declares, under the same names. It shares the scope of its
    memory, so the paths of its parameters do not contain the addresser's name.
    """

    slots: jax.Array
    """(T, R) int32 in [0, N), row of the memory's table that each read takes."""
    blocks: jax.Array
    """(T, R) int32 in [0, E), virtual block into which each read is summed."""
    weights: jax.Array
    """(T, R, h) in the computation's dtype, weight of each slice of d_v/h values of a row."""
