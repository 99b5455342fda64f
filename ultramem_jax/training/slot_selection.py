"""Selects the rows of each table that a step may change, for fine-tuning that leaves the rest as it is.

Sparse memory fine-tuning (arXiv 2510.15103) compares the reads of a batch with reads of background text. A
row that the batch reads often, and the background rarely, holds little else: it is scored high. Only the t
best rows of every table are updated. All other rows, and their optimizer state, keep every bit.

With c(i) reads of slot i in the step, a background of |B| batches of which b(i) read the slot, and r(i) reads
of it in the background, the scores are (`TrainConfig.slot_score`):

- `tf_idf`: c(i)/Σc · log((|B| + 1)/(b(i) + 1)), the paper's;
- `kl`: p(i)·log(p(i)/q(i)), the slot's part of the Kullback-Leibler divergence of the step's reads
  p(i) = c(i)/Σc from the background's, q(i) = (r(i) + 1)/(Σr + N) (arXiv 2604.05248 scores by it, too);
- `reads`: c(i), which needs no background.

Everything here has the size of what a step reads, except for one float32 per slot: what the score takes from
the background (`background_weights`).
"""

import logging
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import RunConfig, TrainConfig
from ultramem_jax.config.exchange_purposes import LOSSES_AND_METRICS, SELECTION_OF_ROWS
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import require
from ultramem_jax.ops.exchanges import named_exchange
from ultramem_jax.ops.lookup import RowsRead
from ultramem_jax.training.background import BackgroundReads, load_background

log = logging.getLogger(__name__)


def needs_background(train: TrainConfig) -> bool:
    """Tells whether a run selects rows by a score that depends on the background."""
    return train.slots_per_step > 0 and train.slot_score != "reads"


def background_weights(background: BackgroundReads, score: str) -> np.ndarray:
    """Returns what a score takes from the background of a table, (N,) float32.

    Args:
        background: reads of the table.
        score: `tf_idf`, for which this is the logarithm of the inverse document frequency, or `kl`, for which
            it is log q.
    """
    if score == "tf_idf":
        return np.log((background.num_batches + 1) / (background.batches + 1.0)).astype(np.float32)
    total = background.reads.sum(dtype=np.float64) + len(background.reads)
    return np.log((background.reads + 1.0) / total).astype(np.float32)


def background_of(config: RunConfig) -> dict[str, np.ndarray]:
    """Returns `background_weights` of each table from the file of a run; nothing if the run needs none.

    Raises:
        UserError: see `training.background.load_background`; or the file is of a model with other tables.
    """
    if not needs_background(config.train):
        return {}
    path = config.train.background
    background, about = load_background(path)
    expected = {table: readers[0].num_slots for table, readers in table_readers(config.model).items()}
    found = {table: len(of.batches) for table, of in background.items()}
    allowed = f"must count the reads of this model, with slots by table {expected}, and it has {found}"
    require(found == expected, "train.background", path, allowed)
    of, read = about.get("model", "a model"), about["num_batches"]
    log.info("the background of selected rows: reads of %s in %d batches (%s)", of, read, path)
    return {table: background_weights(of, config.train.slot_score) for table, of in background.items()}


def slot_scores(score: str, counts: jax.Array, num_reads: int, weights: jax.Array | None = None) -> jax.Array:
    """Returns the scores (U,) float32 of rows that a step read.

    Args:
        score: `TrainConfig.slot_score`.
        counts: (U,) int32, reads of each row.
        num_reads: Σc, reads of the whole table in the step.
        weights: (U,) float32, `background_weights` of these rows; None for `reads`.
    """
    reads = counts.astype(jnp.float32)
    if weights is None:
        return reads
    if score == "tf_idf":
        return reads * weights / num_reads
    share = reads / num_reads
    return share * (jnp.log(jnp.maximum(share, 1e-30)) - weights)


class Selection(NamedTuple):
    """Selects the rows that a step may change, of those that it read."""

    score: str
    """`TrainConfig.slot_score`."""
    most: int
    """t, the most rows of a table."""

    def __call__(
        self,
        rows: RowsRead,
        num_reads: int,
        num_slots: int,
        background: jax.Array | None,
        axes: tuple[str, ...] = (),
    ) -> tuple[RowsRead, dict[str, jax.Array]]:
        """Returns the rows, and a metric.

        Args:
            rows: the rows that the step read; of this device if the table is split over devices.
            num_reads: reads of the whole table.
            num_slots: N, rows of the table; of this device.
            background: (N,) float32, `background_weights`; of this device. None for `reads`.
            axes: mesh axes over which the table's rows are split, within a `jax.shard_map`.

        Returns:
            At most t rows over all devices, see `kept_rows`; of rows with equal scores, those with smaller
            slots. And `selected_reads_share`, their share of the step's reads.
        """
        weights = None if background is None else background.at[rows.slots].get(mode="clip")
        scores = slot_scores(self.score, rows.counts, num_reads, weights)
        kept = kept_rows(rows, best_rows(scores, rows.counts, self.most, axes), num_slots)
        reads = kept.counts.sum()
        if axes:
            with named_exchange(LOSSES_AND_METRICS):
                reads = jax.lax.psum(reads, axes)
        return kept, {"selected_reads_share": reads.astype(jnp.float32) / num_reads}


def selection_of(train: TrainConfig) -> Selection | None:
    """Returns the selection of rows that a run makes; None if a step changes all rows that it read."""
    return Selection(train.slot_score, train.slots_per_step) if train.slots_per_step else None


def best_rows(scores: jax.Array, counts: jax.Array, most: int, axes: tuple[str, ...] = ()) -> jax.Array:
    """Returns the rows with the largest scores: their indices, rising, padded with U.

    Args:
        scores: (U,) float32.
        counts: (U,) int32, zero for rows that do not take part.
        most: t, the most rows over all devices.
        axes: mesh axes whose devices have other rows, of which those of earlier devices have smaller slots.

    Returns:
        (min(t, U),) int32.
    """
    size = min(most, scores.shape[0])
    values, places = jax.lax.top_k(jnp.where(counts > 0, scores, -jnp.inf), size)
    found = values > -jnp.inf
    if axes:
        with named_exchange(SELECTION_OF_ROWS):
            of_all = jax.lax.all_gather(values, axes, tiled=True)
        _, best = jax.lax.top_k(of_all, min(most, of_all.shape[0]))
        own = best - jax.lax.axis_index(axes) * size
        is_best = jnp.zeros(size, bool).at[jnp.where(own < 0, size, own)].set(True, mode="drop")
        found &= is_best
    return jnp.sort(jnp.where(found, places, scores.shape[0]))


def kept_rows(rows: RowsRead, kept: jax.Array, num_slots: int) -> RowsRead:
    """Returns some of the rows that a step read, as if it had read only these.

    Args:
        rows: U rows.
        kept: (k,) int32 indices of rows, rising; those from U on stand for no row.
        num_slots: N; padding of the result counts from here.

    Returns:
        k + 1 rows, of which at least the last one is padding. The reads of the rows that are kept come first,
        in their order. All other reads belong to the first row of padding, in an unspecified order.
    """
    num_rows, size, num_reads = rows.slots.shape[0], kept.shape[0], rows.order.shape[0]
    found, at = kept < num_rows, jnp.minimum(kept, num_rows - 1)
    padding = num_slots + jnp.arange(size + 1, dtype=jnp.int32)
    of_kept = partial(jnp.pad, pad_width=(0, 1))
    counts = of_kept(jnp.where(found, rows.counts[at], 0))
    slots = padding.at[:size].set(jnp.where(found, rows.slots[at], padding[:size]))
    # A row's reads lie together. So read j of a row that is kept lies as far from the row's first read as
    # before.
    first_before = of_kept((jnp.cumsum(rows.counts) - rows.counts)[at])
    ends = jnp.cumsum(counts)
    ended = jnp.zeros(num_reads + 1, jnp.int32).at[ends[:size]].add(found.astype(jnp.int32))
    row_of_read = jnp.cumsum(ended[:num_reads])
    position = jnp.arange(num_reads, dtype=jnp.int32)
    before = first_before[row_of_read] + position - (ends - counts)[row_of_read]
    return RowsRead(slots, counts, rows.order.at[before].get(mode="clip"), row_of_read)
