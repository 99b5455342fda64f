"""Collects what a page says of single slots: their cards."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.model import table_readers
from ultramem_jax.data import Tokenizer
from ultramem_jax.inspection.corpus import CorpusReads, TableReads
from ultramem_jax.inspection.knock_outs import knock_out_each
from ultramem_jax.inspection.names import site_of
from ultramem_jax.inspection.neighbours import nearest_slots
from ultramem_jax.inspection.promotion import Promoted, promoted_tokens
from ultramem_jax.inspection.texts import TokenTexts
from ultramem_jax.inspection.tracing import Trace
from ultramem_jax.ops.rows import take_rows
from ultramem_jax.tree_types import JsonDict, Variables

Progress = Callable[[str, int], Callable[[int], object]]
"""(what is being done, how much of it there is) -> a function that is called with each amount done."""

KNOCK_UNIT = 10_000
"""Effects of knock-outs on single tokens are whole numbers of nats divided by this: most are 0."""
_BEFORE, _AFTER = 60, 44
"""Most characters of a context that are shown before and after its token."""
_PREVIEW = 3
"""Tokens that are shown of a neighbour."""


class Way(NamedTuple):
    """Says how a slot is read: the read whose direction its card shows."""

    memory: str
    block: int
    weights: np.ndarray | None
    """(h,) weights of the read; None where no text reads the slot."""


def rounded(value: float, digits: int = 4) -> float | int:
    """Returns a number with few digits, as a page shows it."""
    short = float(f"{float(value):.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def strengths(config: ModelConfig, variables: Variables, trace: Trace) -> dict[str, np.ndarray]:
    """Returns a number (S, R) for each read of a text, by memory: its mean weight.

    Where reads have no weights, because rows are concatenated as they are, it is the length of the row.
    """
    found = {}
    for name, of in trace.memories.items():
        found[name] = of.scores
        if not site_of(config, name).config.varying_weights:
            table, slots = variables["memory"][of.table]["values"], jnp.asarray(of.slots)
            rows = take_rows(table, slots, jnp.dtype(jnp.float32))
            found[name] = np.linalg.norm(np.asarray(rows), axis=-1)
    return found


def strongest_first(trace: Trace, by: dict[str, np.ndarray], most: int) -> dict[str, dict[int, Way]]:
    """Returns up to `most` slots that a text reads, by table: the strongest reads of all tokens come first.

    Every token, memory and head gets its strongest read, then its second one, and so on.

    Args:
        trace: the trace of the text.
        by: the result of `strengths`.
        most: number of slots.
    """
    found: dict[str, dict[int, Way]] = {of.table: {} for of in trace.memories.values()}
    orders, number = [], 0
    for name, of in trace.memories.items():
        for head in range(len(of.heads)):
            scores = of.of_head(np.abs(by[name]), head)
            order = np.argsort(-scores, axis=1, kind="stable") + head * scores.shape[1]
            orders.append((name, of, order))
    for rank in range(max(order.shape[1] for _, _, order in orders)):
        for token in range(len(trace.ids)):
            for name, of, order in orders:
                if rank >= order.shape[1]:
                    continue
                read = order[token, rank]
                slot = int(of.slots[token, read])
                if slot in found[of.table]:
                    continue
                if number == most:
                    return found
                found[of.table][slot] = Way(name, int(of.blocks[token, read]), of.weights[token, read])
                number += 1
    return found


def way_in_corpus(site: MemorySite, slot: int, reads: TableReads | None) -> Way:
    """Returns how a corpus reads a slot most strongly; by its first memory, with ones, where it does not."""
    contexts = reads.contexts if reads is not None else None
    if reads is not None and contexts is not None:
        row = int(np.searchsorted(contexts.slots, slot))
        if row < len(contexts.slots) and contexts.slots[row] == slot and contexts.counts[row]:
            memory = reads.memories[contexts.memories[row, 0]]
            return Way(memory, int(contexts.blocks[row, 0]), contexts.weights[row, 0])
    return Way(site.name, 0, None)


class Cards:
    """Makes cards: per table and slot, a dict for JSON, without anything that is not shown."""

    def __init__(self, config: ModelConfig, variables: Variables, tokenizer: Tokenizer, tokens: int):
        """Takes the model, and the number of promoted tokens of a card."""
        self._config, self._variables, self._tokens = config, variables, tokens
        self._tokenizer, self._texts = tokenizer, TokenTexts(tokenizer)
        self._sites = {site.name: site for site in config.sites}

    def make(
        self,
        ways: dict[str, dict[int, Way]],
        corpus: CorpusReads | None,
        trace: Trace,
        text: str | bytes,
        neighbours: int,
        progress: Progress,
    ) -> dict[str, dict[int, JsonDict]]:
        """Returns the cards of slots, by table.

        Args:
            ways: the slots of each table, and how they are read.
            corpus: the result of `corpus_pass`, which kept contexts of these slots; None without a corpus.
            trace: the trace of the text.
            text: the text, for knock-outs.
            neighbours: nearest slots of a card.
            progress: where to say how far the work is.
        """
        found: dict[str, dict[int, JsonDict]] = {}
        for table, of_table in ways.items():
            slots = list(of_table)
            cards: dict[int, JsonDict] = {
                slot: {"memory": way.memory, "block": way.block} for slot, way in of_table.items()
            }
            for slot, way in of_table.items():
                if way.weights is not None and self._sites[way.memory].config.varying_weights:
                    cards[slot]["weight"] = rounded(way.weights.mean())
            self._add_promoted(of_table, cards)
            self._add_knock_outs(table, slots, cards, trace, text, progress)
            if neighbours and slots:
                self._add_nearest(table, of_table, cards, neighbours, progress)
            if corpus is not None:
                self._add_corpus(corpus.tables[table], cards)
            found[table] = cards
        return found

    def _add_promoted(self, ways: dict[int, Way], cards: dict[int, JsonDict]) -> None:
        for slots in _groups(ways):
            found = self._promoted([ways[slot] for slot in slots], slots, self._tokens)
            for row, slot in enumerate(slots):
                cards[slot]["up"] = self._scored(found.promoted[row], found.promoted_scores[row])
                cards[slot]["down"] = self._scored(found.suppressed[row], found.suppressed_scores[row])

    def _promoted(self, ways: Sequence[Way], slots: Sequence[int], k: int) -> Promoted:
        """Returns what slots promote when they are read in ways of one group."""
        known = [way.weights for way in ways if way.weights is not None]
        return promoted_tokens(
            self._config,
            self._variables,
            ways[0].memory,
            list(slots),
            k,
            blocks=np.array([way.block for way in ways], np.int32),
            weights=np.stack(known) if known else None,
            vocab_size=self._tokenizer.vocab_size,
        )

    def _scored(self, ids: np.ndarray, scores: np.ndarray) -> list[list[Any]]:
        return [[self._texts.token(int(i)), rounded(score, 3)] for i, score in zip(ids, scores, strict=True)]

    def _add_knock_outs(
        self,
        table: str,
        slots: Sequence[int],
        cards: dict[int, JsonDict],
        trace: Trace,
        text: str | bytes,
        progress: Progress,
    ) -> None:
        readers = [of.slots for of in trace.memories.values() if of.table == table]
        read = np.unique(np.concatenate([np.unique(of) for of in readers]))
        there = [slot for slot in slots if slot in read]
        update = progress(f"knock-outs, {table}", len(there))
        losses = knock_out_each(
            self._config,
            self._variables,
            self._tokenizer,
            text,
            [(table, slot) for slot in there],
            progress=update,
        )
        for slot, without in zip(there, losses, strict=True):
            cards[slot] |= effects(trace, without)

    def _add_nearest(
        self,
        table: str,
        ways: dict[int, Way],
        cards: dict[int, JsonDict],
        neighbours: int,
        progress: Progress,
    ) -> None:
        slots, rows = list(ways), table_readers(self._config)[table][0].num_slots
        update = progress(f"nearest slots, {table}", rows)
        near, cosines = nearest_slots(
            self._config, self._variables, table, slots, neighbours, progress=update
        )
        row_of = {slot: row for row, slot in enumerate(slots)}
        for group in _groups(ways):
            of_group = near[[row_of[slot] for slot in group]]
            # Neighbours are shown as if they were read in the slot's own way.
            same = [ways[slot] for slot in group for _ in range(near.shape[1])]
            found = self._promoted(same, of_group.reshape(-1).tolist(), _PREVIEW).promoted
            for slot, others, ids in zip(group, of_group, found.reshape(*of_group.shape, -1), strict=True):
                cards[slot]["near"] = [
                    [int(other), rounded(cosine, 3), [self._texts.token(int(i)) for i in tokens]]
                    for other, cosine, tokens in zip(others, cosines[row_of[slot]], ids, strict=True)
                ]

    def _add_corpus(self, reads: TableReads, cards: dict[int, JsonDict]) -> None:
        falling = -np.sort(-reads.counts[reads.counts > 0])
        kept = reads.contexts
        for slot, card in cards.items():
            count = int(reads.counts[slot])
            card["count"] = count
            if count:
                card["rank"] = 1 + int(np.searchsorted(-falling, -count, side="left"))
            row = int(np.searchsorted(kept.slots, slot))
            if row < len(kept.slots) and kept.slots[row] == slot:
                card["contexts"] = [self._context(reads, row, entry) for entry in range(kept.counts[row])]
            if reads.ngrams is not None and (found := reads.ngrams.of(slot)):
                card["ngrams"] = [[self._texts.text(ids), n] for ids, n in found]
                card["others"] = count - sum(n for _, n in found)

    def _context(self, reads: TableReads, row: int, entry: int) -> list[Any]:
        kept = reads.contexts
        window, at = kept.windows[row, entry], kept.before
        weighs = self._sites[reads.memories[0]].config.varying_weights > 0
        score = rounded(kept.scores[row, entry], 3) if weighs else None
        return [
            self._texts.text(window[:at])[-_BEFORE:],
            self._texts.token(int(window[at])),
            self._texts.text(window[at + 1 :])[:_AFTER],
            score,
        ]


def effects(trace: Trace, without: np.ndarray) -> JsonDict:
    """Returns what losses rise by: `knock`, of each token in nats times `KNOCK_UNIT`; `effect`, the mean."""
    risen = without.astype(np.float64) - trace.losses
    return {
        "knock": [None if np.isnan(x) else round(KNOCK_UNIT * float(x)) for x in risen],
        "effect": rounded(float(risen[1:].mean()), 3),
    }


def _groups(ways: dict[int, Way]) -> list[list[int]]:
    """Returns the slots that are read by one memory, with weights or without, as lists that are not empty."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for slot, way in ways.items():
        groups.setdefault((way.memory, way.weights is not None), []).append(slot)
    return list(groups.values())


def add_slots(
    ways: dict[str, dict[int, Way]],
    config: ModelConfig,
    corpus: CorpusReads | None,
    table: str,
    slots: Iterable[int],
) -> None:
    """Adds slots of a table to those that get a card, with the way in which a corpus reads them."""
    site = table_readers(config)[table][0]
    reads = corpus.tables[table] if corpus is not None else None
    for slot in map(int, slots):
        ways[table].setdefault(slot, way_in_corpus(site, slot, reads))
