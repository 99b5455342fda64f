"""Counts the n-grams that share rows of an Engram: different ones whose hashes fall on the same row."""

import numpy as np

from ultramem_jax.inspection.contexts import Found, positions_of


class SharedRows:
    """Counts the n-grams that read some slots, up to a number of different ones for each slot.

    N-grams that come when a slot has that many are counted together. N-grams are those of the text's own
    ids: several may share a row because the tokenizer's map of canonical ids makes them equal.
    """

    def __init__(self, slots: np.ndarray, most: int):
        """Begins with slots (C,), rising, of which at most `most` n-grams are kept apart."""
        self._slots, self._most = np.asarray(slots, np.int64), most
        self.counts: dict[int, dict[tuple[int, ...], int]] = {}
        """Slot -> n-gram -> reads. An n-gram is a tuple of ids; -1 stands before the start of a sequence."""
        self.others: dict[int, int] = {}
        """Slot -> reads of n-grams that are not kept apart."""

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
            of_slot = self.counts.setdefault(slot, {})
            key = tuple(ngram)
            if key in of_slot or len(of_slot) < self._most:
                of_slot[key] = of_slot.get(key, 0) + count
            else:
                self.others[slot] = self.others.get(slot, 0) + count

    def of(self, slot: int) -> list[tuple[tuple[int, ...], int]]:
        """Returns the n-grams of a slot with their reads, most frequent first and equal ones by ids."""
        return sorted(self.counts.get(slot, {}).items(), key=lambda item: (-item[1], item[0]))


def _ending_at(tokens: np.ndarray, positions: np.ndarray, order: int) -> np.ndarray:
    """Returns the n ids that end at each position of a flat batch, (n, order); -1 before a sequence."""
    sequences, places = np.divmod(positions, tokens.shape[1])
    columns = places[:, None] + np.arange(1 - order, 1)
    ids = tokens[sequences[:, None], np.maximum(columns, 0)]
    return np.where(columns >= 0, ids, -1).astype(np.int64)
