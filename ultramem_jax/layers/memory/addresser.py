"""Declares what an addresser finds: all that is done with rows begins with it."""

from typing import NamedTuple

import jax


class Reads(NamedTuple):
    """Holds the R reads of every token.

    An addresser is a Flax module `(h, token_ids, chunk) -> Reads`: h (B, S, D) is what the memory reads in
    the model, token_ids (B, S) int32 the ids of these positions (None where nobody has them), and `chunk`, in
    decoding only, says how they follow on what the addresser keeps in the collection `cache`. Its parameters
    are those that its config declares, under the same names. It shares the scope of its memory, so that
    parameters have no name of the addresser's in their path.
    """

    slots: jax.Array
    """(T, R) int32 in [0, N), rows of the memory's table."""
    blocks: jax.Array
    """(T, R) int32 in [0, E): which sum each read belongs to."""
    weights: jax.Array
    """(T, R, h) of the computation's dtype: what each slice of d_v/h values of a row is weighed with."""
