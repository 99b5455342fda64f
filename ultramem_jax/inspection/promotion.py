"""Says which tokens a slot promotes: its value through readout, final norm and output matrix.

This is the direct effect of a row on the logits, as if no later layer changed it. What depends on a token's
hidden state is left out: pre-values, gates, and the convolution of Engram. Biases are left out, too. The
final norm divides by a number that depends on the token, so only order and proportions of the scores have a
meaning.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.errors import at_least, require
from ultramem_jax.inspection.names import checked_slots, site_of
from ultramem_jax.ops.rows import take_rows
from ultramem_jax.tree_types import Variables

_SLOTS_AT_A_TIME = 64
"""Numbers of slots are rounded up to a multiple of this, so that few programs are compiled."""


class Promoted(NamedTuple):
    """Holds the tokens that slots promote and suppress most, each strongest first."""

    promoted: np.ndarray
    """(n, k) int32, token ids."""
    promoted_scores: np.ndarray
    """(n, k) float32, their scores, falling."""
    suppressed: np.ndarray
    """(n, k) int32, token ids."""
    suppressed_scores: np.ndarray
    """(n, k) float32, their scores, rising."""


def promoted_tokens(
    config: ModelConfig,
    variables: Variables,
    memory: str,
    slots: np.ndarray | list[int],
    k: int = 8,
    *,
    blocks: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    vocab_size: int | None = None,
) -> Promoted:
    """Returns the tokens that the rows of some slots promote and suppress most when a memory reads them.

    Args:
        config: the model's config.
        variables: its `params`, `memory` and `buffers`.
        memory: name of the memory, such as `ultramem_0`.
        slots: (n,) rows of its table.
        k: tokens of each slot.
        blocks: (n,) block in which each row is read, in [0, E); None is block 0. Blocks have matrices of
            their own. In Engram, read j of a token is block j.
        weights: (n, h) weights of the read; None is ones. A negative weight turns a row around.
        vocab_size: ids of the tokenizer, which come first; None is all V of the model.

    Raises:
        UserError: an unknown memory, slot or block; a readout of a kind that has no such matrix.
    """
    site = site_of(config, memory)
    slots = checked_slots(config, site.table, np.asarray(slots))
    blocks = np.zeros(len(slots), np.int32) if blocks is None else np.asarray(blocks)
    for block in blocks[(blocks < 0) | (blocks >= site.config.num_blocks)][:1]:
        require(False, f"block of {memory}", int(block), f"must be in [0, {site.config.num_blocks})")
    at_least(1, k=k)
    logits = _logits(config, variables, site, *_padded(slots, blocks, weights))
    scores = np.asarray(logits)[: len(slots), :vocab_size]
    most, least = _largest(scores, k), _largest(-scores, k)
    return Promoted(most, np.take_along_axis(scores, most, 1), least, np.take_along_axis(scores, least, 1))


def _padded(
    slots: np.ndarray, blocks: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns slots, blocks and weights (ones by default) of so many slots that few programs serve all."""
    more = -len(slots) % _SLOTS_AT_A_TIME
    weights = np.ones((len(slots), 1), np.float32) if weights is None else np.asarray(weights, np.float32)
    return (
        np.pad(slots, (0, more)),
        np.pad(blocks.astype(np.int32), (0, more)),
        np.pad(weights, ((0, more), (0, 0))),
    )


@partial(jax.jit, static_argnums=(0, 2))
def _logits(
    config: ModelConfig,
    variables: Variables,
    site: MemorySite,
    slots: jax.Array,
    blocks: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Returns the scores (n, V) of all tokens, in float32."""
    readout, num_blocks = site.config.readout, site.config.num_blocks
    rows = take_rows(variables["memory"][site.table]["values"], slots, jnp.dtype(jnp.float32))
    rows = rows * jnp.repeat(weights, rows.shape[1] // weights.shape[1], axis=1)
    # As in the readout: each row stands in its block, with zeros in the others.
    pooled = jax.nn.one_hot(blocks, num_blocks, dtype=jnp.float32)[:, :, None] * rows[:, None]
    params = variables["params"]
    matrices = [readout.value_matrix(site, params.get(site.name, {}), i) for i in range(num_blocks)]
    written = pooled.reshape(len(rows), -1)
    known = [matrix for matrix in matrices if matrix is not None]
    if known:
        written = written @ jnp.concatenate(known).astype(jnp.float32)
    gain = jnp.asarray(params["final_norm"]["scale"]).astype(jnp.float32)
    output = params["embedding"].T if config.tie_embeddings else params["output"]
    return (written * gain[None]) @ jnp.asarray(output).astype(jnp.float32)


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the ids of the k largest scores of each row (n, V), largest first and equal ones by id."""
    k = min(k, scores.shape[1])
    kth = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    found = np.empty((len(scores), k), np.int32)
    for row, (of_row, least) in enumerate(zip(scores, kth, strict=True)):
        ids = np.flatnonzero(of_row >= least)
        found[row] = ids[np.argsort(-of_row[ids], kind="stable")[:k]]
    return found
