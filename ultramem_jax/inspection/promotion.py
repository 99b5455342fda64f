"""Says which tokens a slot promotes: its value through readout, final norm and output matrix.

This is the direct effect of a row on the logits, as if no later layer changed it. What depends on a token's
hidden state is left out: gates, the convolution of Engram, and pre-values, unless they are in the weights, as
in those of a trace. Biases are left out, too. The final norm divides by a number that depends on the token,
so only order and proportions of the scores have a meaning.
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

_TOGETHER = 64
"""Slots whose scores of all tokens are held at a time."""


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
    ids = config.vocab_size if vocab_size is None else min(vocab_size, config.vocab_size)
    padded = _padded(slots, blocks, weights)
    parts = [
        _extremes(
            config, variables, site, min(k, ids), ids, *(of[first : first + _TOGETHER] for of in padded)
        )
        for first in range(0, len(padded[0]), _TOGETHER)
    ]
    return Promoted(*(np.concatenate(of)[: len(slots)] for of in zip(*parts, strict=True)))


def _padded(
    slots: np.ndarray, blocks: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns slots, blocks and weights (ones by default), padded to whole groups of slots."""
    more = -len(slots) % _TOGETHER if len(slots) else _TOGETHER
    weights = np.ones((len(slots), 1), np.float32) if weights is None else np.asarray(weights, np.float32)
    return (
        np.pad(slots, (0, more)),
        np.pad(blocks.astype(np.int32), (0, more)),
        np.pad(weights, ((0, more), (0, 0))),
    )


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _extremes(
    config: ModelConfig,
    variables: Variables,
    site: MemorySite,
    k: int,
    vocab_size: int,
    slots: jax.Array,
    blocks: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, ...]:
    """Returns the fields of `Promoted` for the first ids."""
    scores = _logits(config, variables, site, slots, blocks, weights)[:, :vocab_size]
    highest, most = jax.lax.top_k(scores, k)
    lowest, least = jax.lax.top_k(-scores, k)
    return most, highest, least, -lowest


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
