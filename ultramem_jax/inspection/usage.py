"""Says how evenly the slots of a table are read: dead and over-used ones, and entropy over training."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import at_least, require

_CURVES = ("read_entropy", "slots_read_share")
"""Metrics of a training record, by table, that `training_curves` collects."""


@dataclass(frozen=True)
class Usage:
    """Holds how the reads of a text spread over the slots of a table."""

    num_slots: int
    """N, rows of the table."""
    num_reads: int
    """All reads."""
    never_read_share: float
    """Share of the N slots that no token read, in [0, 1]: the dead ones, as far as this text goes."""
    top_share: float
    """Share of the reads that go to the 1 % of the N slots (at least one) that are read most."""
    entropy: float
    """Entropy of the reads over slots, in nats; log N if all slots are read equally often."""
    entropy_share: float
    """The entropy divided by log N, in [0, 1]."""
    most_read: np.ndarray
    """(k,) slots that are read most, most first and equal ones by number."""
    most_counts: np.ndarray
    """(k,) reads of each of them."""
    ranks: np.ndarray
    """(r,) ranks from 1 up to the number of slots read, at equal distances on a logarithmic scale."""
    rank_counts: np.ndarray
    """(r,) reads of the slot of each of these ranks, falling."""


def usage(counts: np.ndarray, k: int = 16, points: int = 120) -> Usage:
    """Returns how the reads of a table are distributed.

    Args:
        counts: (N,) reads of every slot.
        k: slots that are read most, as far as there are so many that were read.
        points: the most ranks to return.

    Raises:
        UserError: no slot, or no read.
    """
    at_least(1, k=k, points=points)
    counts = np.asarray(counts)
    num_slots, num_reads = len(counts), int(counts.sum(dtype=np.int64))
    require(num_reads > 0, "reads of the table", num_reads, "must be at least 1")
    read = counts[counts > 0]
    falling = np.sort(read)[::-1]
    top = max(num_slots // 100, 1)
    shares = read / num_reads
    # 0.0 in place of -0.0, where one slot has all reads.
    entropy = max(float(-(shares * np.log(shares)).sum()), 0.0)
    most = most_read(counts, k)
    ranks = np.unique(np.rint(np.geomspace(1, len(read), min(points, len(read)))).astype(np.int64))
    return Usage(
        num_slots=num_slots,
        num_reads=num_reads,
        never_read_share=1 - len(read) / num_slots,
        top_share=float(falling[:top].sum(dtype=np.int64) / num_reads),
        entropy=entropy,
        entropy_share=entropy / float(np.log(num_slots)) if num_slots > 1 else 1.0,
        most_read=most,
        most_counts=counts[most],
        ranks=ranks,
        rank_counts=falling[ranks - 1],
    )


def most_read(counts: np.ndarray, k: int) -> np.ndarray:
    """Returns the slots of the k largest counts, largest first and equal ones by number; none of count 0."""
    slots = np.flatnonzero(counts)
    of_slots = -counts[slots].astype(np.int64)
    if len(slots) > k:
        near = np.flatnonzero(of_slots <= np.partition(of_slots, k - 1)[k - 1])
        slots, of_slots = slots[near], of_slots[near]
    chosen: np.ndarray = slots[np.argsort(of_slots, kind="stable")[:k]]
    return chosen


def training_curves(
    config: ModelConfig, records: Iterable[Mapping[str, object]]
) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Returns how the reads of every table developed in training.

    Args:
        config: the model's config.
        records: lines of a run's `metrics.jsonl` (`training.metrics.read_metrics`).

    Returns:
        Per table `read_entropy` (nats, of the reads of a step) and `slots_read_share` (in [0, 1], slots that
        were read since the start), as steps and values. A table or metric that no record has is left out.
    """
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    tables = table_readers(config)
    for record in records:
        step = record.get("step")
        for table in tables:
            for name in _CURVES:
                value = record.get(f"{table}/{name}")
                if isinstance(step, int) and isinstance(value, int | float) and np.isfinite(value):
                    steps, values = found.setdefault(table, {}).setdefault(name, ([], []))
                    steps.append(step)
                    values.append(float(value))
    return found
