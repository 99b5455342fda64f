"""Traces a text through a model: its loss, and what every token reads from every memory."""

from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory_parts import Head
from ultramem_jax.data import Tokenizer
from ultramem_jax.errors import UserError, require
from ultramem_jax.inspection.names import require_memories
from ultramem_jax.models import Transformer
from ultramem_jax.tree_types import Variables

Reads: TypeAlias = dict[str, dict[str, jax.Array]]
"""Per memory `slots` and `blocks` (T, R) int32 and `weights` (T, R, h), as memories sow them."""


@dataclass(frozen=True)
class MemoryReads:
    """Holds what the tokens of a text read from one memory; R reads each, ordered by head."""

    table: str
    """Name of the table, in the collection `memory`."""
    heads: tuple[Head, ...]
    """G heads; head g has the reads from g·R/G up to (g + 1)·R/G."""
    slots: np.ndarray
    """(S, R) int32, rows of the table."""
    blocks: np.ndarray
    """(S, R) int32, blocks into which the rows are summed."""
    weights: np.ndarray
    """(S, R, h) float32, weights of the slices of a row: the addresser's scores, times what pre-values add.
    A gate of the readout is not part of them."""

    @property
    def scores(self) -> np.ndarray:
        """Returns the mean of each read's h weights, (S, R) float32."""
        return self.weights.mean(-1)

    def of_head(self, array: np.ndarray, head: int) -> np.ndarray:
        """Returns the part of an array (S, R, ...) that belongs to a head, (S, R/G, ...)."""
        size = array.shape[1] // len(self.heads)
        return array[:, head * size : (head + 1) * size]


@dataclass(frozen=True)
class Trace:
    """Holds a text as a model reads it. The first tokens are `start_ids` of the tokenizer."""

    ids: np.ndarray
    """(S,) int32."""
    pieces: tuple[bytes, ...]
    """Bytes of each token; empty for special tokens."""
    num_bytes: int
    """Bytes of the text."""
    losses: np.ndarray
    """(S,) float32, the loss of each token after those before it, in nats; NaN for the first."""
    memories: dict[str, MemoryReads]
    """Reads by the name of the memory."""

    @property
    def loss(self) -> float:
        """Returns the mean loss of all tokens but the first, in nats."""
        return float(self.losses[1:].mean(dtype=np.float64))

    def slots_of(self, table: str) -> np.ndarray:
        """Returns the slots of a table that the text reads, (n,) int32, rising."""
        reads = [of.slots.reshape(-1) for of in self.memories.values() if of.table == table]
        return np.unique(np.concatenate(reads))


def trace(config: ModelConfig, variables: Variables, tokenizer: Tokenizer, text: str | bytes) -> Trace:
    """Traces a text through a model, in one pass.

    Args:
        config: the model's config.
        variables: its `params`, `memory` and `buffers`.
        tokenizer: its tokenizer.
        text: the text, as one document from its beginning.

    Raises:
        UserError: the model has no memory; the text has no token, or more than the model reads at once.
    """
    require_memories(config)
    ids = encoded(config, tokenizer, text)
    losses, reads = _losses_and_reads(config, variables, ids[None])
    memories = {}
    for site in config.sites:
        slots, blocks, weights = (np.asarray(reads[site.name][of]) for of in ("slots", "blocks", "weights"))
        memories[site.name] = MemoryReads(
            site.table, site.config.address.heads, slots, blocks, weights.astype(np.float32, copy=False)
        )
    # Some tokenizers put a blank before a document, which is no byte of the text.
    first = len(tokenizer.start_ids)
    pieces = tuple(tokenizer.decode(ids[i : i + 1], continuing=i > first) for i in range(len(ids)))
    return Trace(ids, pieces, len(_bytes_of(text)), np.asarray(losses)[0], memories)


def encoded(config: ModelConfig, tokenizer: Tokenizer, text: str | bytes) -> np.ndarray:
    """Returns the ids of a text, with those that start a document: (S,) int32; errors as in `trace`."""
    ids = tokenizer.encode(_bytes_of(text))
    require(len(ids) > 0, "text", text, "must have at least one token")
    ids = np.concatenate([np.asarray(tokenizer.start_ids, np.int32), ids])
    most = config.max_length or len(ids)
    allowed = f"must be at most {most}, the model's longest context"
    require(len(ids) <= most, "tokens of the text", len(ids), allowed)
    return ids


def _bytes_of(text: str | bytes) -> bytes:
    try:
        return text.encode(errors="surrogateescape") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise UserError(f"text = {text!r}: must be text, {error.reason}") from None


def token_losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the loss of each token after those before it, (B, S) float32; NaN for the first.

    Args:
        logits: (B, S, V) float32.
        tokens: (B, S) int32.
    """
    before = logits[:, :-1]
    chosen = jnp.take_along_axis(before, tokens[:, 1:, None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(before, axis=-1) - chosen
    return jnp.pad(losses, ((0, 0), (1, 0)), constant_values=jnp.nan)


@partial(jax.jit, static_argnums=0)
def _losses_and_reads(
    config: ModelConfig, variables: Variables, tokens: jax.Array
) -> tuple[jax.Array, Reads]:
    logits, sown = Transformer(config).apply(variables, tokens, mutable=["reads"])
    return token_losses(logits, tokens), sown["reads"]


@partial(jax.jit, static_argnums=0)
def reads_of(config: ModelConfig, variables: Variables, tokens: jax.Array) -> Reads:
    """Returns what all memories read for tokens (B, S); the compiler leaves out what comes after them."""
    _, sown = Transformer(config).apply(variables, tokens, mutable=["reads"])
    found: Reads = sown["reads"]
    return found
