"""Keeps the strongest reads of some slots, with the tokens around them, while a corpus goes by."""

from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    """Holds reads of one batch."""

    slots: np.ndarray
    """(n,) slots."""
    scores: np.ndarray
    """(n,) float32, mean weight of each read."""
    positions: np.ndarray
    """(n,) positions in the flat batch (T,), and so the order of equal scores."""
    memories: np.ndarray
    """(n,) int32, number of the memory among the table's readers."""
    reads: np.ndarray
    """(n,) int32, number of the read among the R of its token."""
    blocks: np.ndarray
    """(n,) int32, block of each read."""
    weights: np.ndarray
    """(n, h) float32."""

    def of(self, which: np.ndarray) -> "Found":
        """Returns a part of the reads."""
        return Found(*(array[which] for array in self))


class Contexts:
    """Holds up to k reads of each of C slots, those of the largest absolute scores; earlier ones come first.

    A token that reads a slot several times counts once, with its strongest read. All arrays have the shape
    (C, k, ...); `counts` says how many entries of a slot are filled.
    """

    def __init__(self, slots: np.ndarray, k: int, before: int, after: int, num_weights: int):
        """Begins with slots (C,), rising, whose reads are kept with so many tokens before and after."""
        self.k, self.before, self.after, self._num_weights = k, before, after, num_weights
        self._begin(np.asarray(slots, np.int64))

    def _begin(self, slots: np.ndarray) -> None:
        self.slots, size = slots, (len(slots), self.k)
        self.counts = np.zeros(len(slots), np.int32)
        """(C,) filled entries."""
        self.scores = np.zeros(size, np.float32)
        """(C, k) scores of the reads."""
        self.memories = np.zeros(size, np.int32)
        """(C, k) number of the memory among the table's readers."""
        self.blocks = np.zeros(size, np.int32)
        """(C, k) block of each read."""
        self.weights = np.zeros((*size, self._num_weights), np.float32)
        """(C, k, h) weights of each read."""
        self.windows = np.full((*size, self.before + 1 + self.after), -1, np.int32)
        """(C, k, before + 1 + after) token ids around each read; -1 where the sequence has none."""

    _KEPT = ("scores", "memories", "blocks", "weights", "windows")

    def track(self, slots: np.ndarray) -> None:
        """Changes the slots, (C,) rising: those that remain keep their reads, and new ones have none."""
        slots = np.asarray(slots, np.int64)
        if np.array_equal(slots, self.slots):
            return
        there, here = positions_of(self.slots, slots)
        kept = {name: getattr(self, name)[there] for name in ("counts", *self._KEPT)}
        self._begin(slots)
        for name, array in kept.items():
            getattr(self, name)[here] = array

    def row_of(self, slot: int) -> int | None:
        """Returns the row of a slot in the arrays; None if it is not tracked."""
        _, rows = positions_of(np.array([slot]), self.slots)
        return int(rows[0]) if len(rows) else None

    def add(self, found: Found, tokens: np.ndarray) -> None:
        """Adds the reads of a batch.

        Args:
            found: reads of the slots that are tracked, and of others, which are passed over.
            tokens: (B, S) ids of the batch, -1 for padding.
        """
        which, rows = positions_of(found.slots, self.slots)
        if len(which) == 0:
            return
        found = found.of(which)
        strength = np.abs(found.scores)
        # The strongest read of a slot by each token, then the k strongest tokens of each slot.
        order = np.lexsort((found.reads, found.memories, -strength, found.positions, rows))
        first = np.ones(len(order), bool)
        pairs = rows[order], found.positions[order]
        first[1:] = (np.diff(pairs[0]) != 0) | (np.diff(pairs[1]) != 0)
        order = order[first]
        order = order[np.lexsort((found.positions[order], -strength[order], rows[order]))]
        order = order[_rank_in_group(rows[order]) < self.k]
        for row in np.unique(rows[order]):
            self._merge(row, found.of(order[rows[order] == row]), tokens)

    def _merge(self, row: int, found: Found, tokens: np.ndarray) -> None:
        """Merges reads of one slot, which come strongest first, into those that are kept."""
        there = self.counts[row]
        strengths = np.abs(np.concatenate([self.scores[row, :there], found.scores]))
        best = np.argsort(-strengths, kind="stable")[: self.k]  # earlier batches come first
        new = {
            "scores": found.scores,
            "memories": found.memories,
            "blocks": found.blocks,
            "weights": found.weights,
            "windows": _windows(tokens, found.positions, self.before, self.after),
        }
        for name in self._KEPT:
            kept = getattr(self, name)
            kept[row, : len(best)] = np.concatenate([kept[row, :there], new[name]])[best]
        self.counts[row] = len(best)


def positions_of(slots: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of `slots` (n,) that are in `known` (C,), rising, and their places in it."""
    if len(known) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    places = np.minimum(np.searchsorted(known, slots), len(known) - 1)
    which = np.flatnonzero(known[places] == slots)
    return which, places[which]


def _rank_in_group(groups: np.ndarray) -> np.ndarray:
    """Returns the number of each entry within its run of equal groups, from 0."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


def _windows(tokens: np.ndarray, positions: np.ndarray, before: int, after: int) -> np.ndarray:
    """Returns the ids around each position of a flat batch; -1 beyond its sequence."""
    sequences, places = np.divmod(positions, tokens.shape[1])
    columns = places[:, None] + np.arange(-before, after + 1)
    inside = (columns >= 0) & (columns < tokens.shape[1])
    ids = tokens[sequences[:, None], np.clip(columns, 0, tokens.shape[1] - 1)]
    return np.where(inside, ids, -1).astype(np.int32)
