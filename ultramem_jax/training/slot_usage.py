"""Counts which slots of a table have been read, and how evenly, from the rows read and not from all N."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.config.exchange_purposes import LOSSES_AND_METRICS
from ultramem_jax.kernels import calls
from ultramem_jax.kernels.dispatch import native_or
from ultramem_jax.ops.exchanges import named_exchange
from ultramem_jax.ops.lookup import RowsRead


class SlotUsage(NamedTuple):
    """Records which slots of one table have been read since the start of training."""

    seen: jax.Array
    """(N,) bool, true for slots that were read at least once."""
    num_seen: jax.Array
    """() int32, the number of slots that were read at least once."""


def init_usage(num_slots: int) -> SlotUsage:
    """Returns the record in which no slot has been read."""
    return SlotUsage(jnp.zeros((num_slots,), bool), jnp.zeros((), jnp.int32))


def record_reads(
    usage: SlotUsage, rows: RowsRead, num_reads: int, axes: tuple[str, ...] = ()
) -> tuple[SlotUsage, dict[str, jax.Array]]:
    """Adds the rows that a step read.

    Args:
        usage: usage of the slots before the step; of this device's rows if the table is split over devices.
        rows: what was read of these rows.
        num_reads: reads of the whole table.
        axes: mesh axes over which the table's rows are split, within a `jax.shard_map`.

    Returns:
        The usage, and metrics: `slots_read_share` in [0, 1], the share of the N slots read so far, and
        `read_entropy` in nats, of the distribution of this step's reads over slots (log N when all are read
        equally often).
    """
    kernel = partial(calls.record_reads, num_reads=num_reads)
    plain = partial(_record, num_reads=num_reads)
    serves = rows.slots.size > 0
    seen, num_new, entropy = native_or(plain, kernel, serves, usage.seen, rows.slots, rows.counts)
    num_slots = jnp.float32(usage.seen.shape[0])
    if axes:
        with named_exchange(LOSSES_AND_METRICS):
            num_new, entropy = jax.lax.psum((num_new, entropy), axes)
        num_slots = num_slots * jax.lax.axis_size(axes)
    num_seen = usage.num_seen + num_new
    metrics = {
        "slots_read_share": num_seen.astype(jnp.float32) / num_slots,
        "read_entropy": entropy,
    }
    return SlotUsage(seen, num_seen), metrics


def _record(
    seen: jax.Array, slots: jax.Array, counts: jax.Array, num_reads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `seen` with these slots, how many of them are new, and the entropy of the reads."""
    seen_before = seen.at[slots].get(mode="fill", fill_value=True)
    num_new = (~seen_before).sum(dtype=jnp.int32)
    seen = seen.at[slots].set(True, mode="drop", unique_indices=True, indices_are_sorted=True)
    share = counts.astype(jnp.float32) / jnp.float32(num_reads)
    entropy = -jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0))
    return seen, num_new, entropy
