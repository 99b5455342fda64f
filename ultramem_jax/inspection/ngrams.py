"""Counts the n-grams that share rows of an Engram: different ones whose hashes fall on the same row."""

import numpy as np

from ultramem_jax.inspection.contexts import Found, positions_of

_APART = 32
"""N-grams of a slot that are counted apart, for each one that is returned."""


class SharedRows:
    """Counts the n-grams that read some slots, and returns the most frequent ones of each.

    A slot has a bounded number of counters: an n-gram that comes first when all are taken is not counted.
    N-grams are those of the text's own ids: several may share a row because the tokenizer's map of canonical
    ids makes them equal.
    """

    def __init__(self, slots: np.ndarray, k: int):
        """Begins with slots (C,), rising, of which k n-grams each are returned."""
        self._k = k
        self._slots = np.empty(0, np.int64)
        self._counts: dict[int, dict[tuple[int, ...], int]] = {}
        self.track(slots)

    def track(self, slots: np.ndarray) -> None:
        """Changes the slots, (C,) rising: those that remain keep their counts, and new ones have none."""
        self._slots = np.asarray(slots, np.int64)
        self._counts = {slot: self._counts.get(slot, {}) for slot in self._slots.tolist()}

    def add(self, found: Found, orders: np.ndarray, tokens: np.ndarray) -> None:
        """Adds the reads of a batch.

        Args:
            found: reads of one memory.
            orders: (R,) length of the n-gram of each read of a token.
            tokens: (B, S) ids of the batch.
        """
        which, _ = positions_of(found.slots, self._slots)
        for order in np.unique(orders):
            part = which[orders[found.reads[which]] == order]
            if len(part):
                self._add(found.slots[part], _ending_at(tokens, found.positions[part], int(order)))

    def _add(self, slots: np.ndarray, ngrams: np.ndarray) -> None:
        keyed = np.concatenate([slots[:, None], ngrams], axis=1)
        for (slot, *ngram), count in zip(
            *map(np.ndarray.tolist, np.unique(keyed, axis=0, return_counts=True)), strict=True
        ):
            of_slot, key = self._counts[slot], tuple(ngram)
            if key in of_slot or len(of_slot) < _APART * self._k:
                of_slot[key] = of_slot.get(key, 0) + count

    def of(self, slot: int) -> list[tuple[tuple[int, ...], int]]:
        """Returns up to k n-grams of a slot with their reads, most frequent first and equal ones by ids.

        An n-gram is a tuple of ids; -1 stands before the start of a sequence.
        """
        counted = self._counts.get(slot, {}).items()
        return sorted(counted, key=lambda item: (-item[1], item[0]))[: self._k]


def _ending_at(tokens: np.ndarray, positions: np.ndarray, order: int) -> np.ndarray:
    """Returns the n ids that end at each position of a flat batch, (n, order); -1 before a sequence."""
    sequences, places = np.divmod(positions, tokens.shape[1])
    columns = places[:, None] + np.arange(1 - order, 1)
    ids = tokens[sequences[:, None], np.maximum(columns, 0)]
    return np.where(columns >= 0, ids, -1).astype(np.int64)
