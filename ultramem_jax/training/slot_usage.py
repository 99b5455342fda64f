"""Which slots of a table have been read, and how evenly: counted from the rows that were read, not from N."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops.lookup import RowsRead


class SlotUsage(NamedTuple):
    """The record of one table since the start of training."""

    seen: jax.Array
    """(N,) bool: read at least once."""
    num_seen: jax.Array
    """() int32: how many are."""


def init_usage(num_slots: int) -> SlotUsage:
    """Nothing has been read."""
    return SlotUsage(jnp.zeros((num_slots,), bool), jnp.zeros((), jnp.int32))


def record_reads(usage: SlotUsage, rows: RowsRead) -> tuple[SlotUsage, dict[str, jax.Array]]:
    """Adds the rows that a step read.

    Returns:
        The usage, and metrics: `slots_read_share` in [0, 1], the share of the N slots read so far, and
        `read_entropy` in nats, of the distribution of this step's reads over slots (log N when all are read
        equally often).
    """
    seen_before = usage.seen.at[rows.slots].get(mode="fill", fill_value=True)
    num_seen = usage.num_seen + (~seen_before).sum(dtype=jnp.int32)
    seen = usage.seen.at[rows.slots].set(True, mode="drop", unique_indices=True, indices_are_sorted=True)
    counts = rows.counts.astype(jnp.float32)
    share = counts / counts.sum()
    entropy = -jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0))
    metrics = {
        "slots_read_share": num_seen.astype(jnp.float32) / usage.seen.shape[0],
        "read_entropy": entropy,
    }
    return SlotUsage(seen, num_seen), metrics
