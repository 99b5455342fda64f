"""Collects what a page says of single slots: their cards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.data import Tokenizer
from ultramem_jax.inspection.corpus import CorpusReads, TableReads
from ultramem_jax.inspection.knock_outs import knock_out_each
from ultramem_jax.inspection.neighbours import nearest_slots
from ultramem_jax.inspection.promotion import Promoted, promoted_tokens
from ultramem_jax.inspection.texts import TokenTexts
from ultramem_jax.inspection.tracing import Trace
from ultramem_jax.inspection.ways import Way, only_block
from ultramem_jax.tree_types import JsonDict, Variables

Progress = Callable[[str, int], Callable[[int], object]]
"""(what is being done, how much of it there is) -> a function that is called with each amount done."""

KNOCK_UNIT = 10_000
"""Effects of knock-outs on single tokens are whole numbers of nats divided by this: most are 0."""
_BEFORE, _AFTER = 60, 44
"""Most characters of a context that are shown before and after its token."""
_PREVIEW = 3
"""Tokens that are shown of a neighbour."""


def rounded(value: float, digits: int = 4) -> float | int | None:
    """Returns a number with few digits, as a page shows it; None if it is not finite."""
    if not np.isfinite(value):
        return None
    short = float(f"{float(value):.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


class Cards:
    """Makes cards: per table and slot, a dict for JSON, without anything that is not shown."""

    def __init__(self, config: ModelConfig, variables: Variables, tokenizer: Tokenizer, tokens: int):
        """Takes the model, and the number of promoted tokens of a card."""
        self._config, self._variables, self._tokens = config, variables, tokens
        self._tokenizer, self._texts = tokenizer, TokenTexts(tokenizer)
        self._sites = {site.name: site for site in config.sites}

    def make(
        self,
        ways: Mapping[str, Mapping[int, Way | None]],
        corpus: CorpusReads | None,
        trace: Trace,
        text: str | bytes,
        neighbours: int,
        progress: Progress,
    ) -> dict[str, dict[int, JsonDict]]:
        """Returns the cards of slots, by table.

        Args:
            ways: the slots of each table, and how they are read, from `ways_of`. Where it is not known, the
                card does not say what a slot promotes.
            corpus: the result of `corpus_pass`, which kept contexts of these slots; None without a corpus.
            trace: the trace of the text.
            text: the text, for knock-outs.
            neighbours: nearest slots of a card.
            progress: where to say how far the work is.
        """
        found: dict[str, dict[int, JsonDict]] = {}
        for table, of_table in ways.items():
            known = {slot: way for slot, way in of_table.items() if way is not None}
            cards: dict[int, JsonDict] = {slot: {} for slot in of_table}
            for slot, way in known.items():
                cards[slot] |= {"memory": way.memory, "block": way.block}
                if way.weights is not None and self._sites[way.memory].config.varying_weights:
                    cards[slot]["weight"] = rounded(way.weights.mean())
            self._add_promoted(known, cards)
            self._add_knock_outs(table, cards, trace, text, progress)
            if neighbours and cards:
                self._add_nearest(table, known, cards, neighbours, progress)
            if corpus is not None:
                self._add_corpus(corpus.tables[table], cards)
            found[table] = cards
        return found

    def _add_promoted(self, ways: dict[int, Way], cards: dict[int, JsonDict]) -> None:
        for slots in _groups(ways):
            found = self._promoted([ways[slot] for slot in slots], slots, self._tokens)
            for slot, *of_slot in zip(slots, *found, strict=True):
                # A row that is not finite promotes no token more than another.
                finite = all(np.isfinite(of).all() for of in of_slot)
                cards[slot]["up"] = self._scored(*of_slot[:2]) if finite else None
                cards[slot]["down"] = self._scored(*of_slot[2:]) if finite else None

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
        cards: dict[int, JsonDict],
        trace: Trace,
        text: str | bytes,
        progress: Progress,
    ) -> None:
        slots = [slot for slot in trace.slots_of(table).tolist() if slot in cards]
        if not slots:
            return
        losses, without = knock_out_each(
            self._config,
            self._variables,
            self._tokenizer,
            text,
            [(table, slot) for slot in slots],
            progress=progress(f"knock-outs, {table}", len(slots)),
        )
        for slot, of_slot in zip(slots, without, strict=True):
            cards[slot] |= effects(losses, of_slot)

    def _add_nearest(
        self,
        table: str,
        ways: dict[int, Way],
        cards: dict[int, JsonDict],
        neighbours: int,
        progress: Progress,
    ) -> None:
        slots, rows = list(cards), table_readers(self._config)[table][0].num_slots
        update = progress(f"nearest slots, {table}", rows)
        near, cosines = nearest_slots(
            self._config, self._variables, table, slots, neighbours, progress=update
        )
        near_to = dict(zip(slots, near.tolist(), strict=True))
        promoted: dict[int, np.ndarray] = {}
        for group in _groups(ways):
            there = [(ways[slot], other) for slot in group for other in near_to[slot]]
            same = [self._for_another(way, other) for way, other in there]
            ids = self._promoted(same, [other for _, other in there], _PREVIEW).promoted
            promoted |= zip(group, ids.reshape(len(group), near.shape[1], ids.shape[1]), strict=True)
        for slot, of_slot in zip(slots, cosines, strict=True):
            words = promoted.get(slot, np.empty((near.shape[1], 0)))
            cards[slot]["near"] = [
                [other, rounded(cosine, 3), [self._texts.token(int(i)) for i in ids]]
                for other, cosine, ids in zip(near_to[slot], of_slot, words, strict=True)
                if np.isfinite(cosine)
            ]

    def _for_another(self, way: Way, slot: int) -> Way:
        """Returns how a neighbour is shown: read as the slot itself, in a block of its own if it has one."""
        block = only_block(self._sites[way.memory], slot)
        return way if block is None else way._replace(block=block)

    def _add_corpus(self, reads: TableReads, cards: dict[int, JsonDict]) -> None:
        falling = -np.sort(-reads.counts[reads.counts > 0])
        kept = reads.contexts
        for slot, card in cards.items():
            count = int(reads.counts[slot])
            card["count"] = count
            if count:
                card["rank"] = 1 + int(np.searchsorted(-falling, -count, side="left"))
            row = kept.row_of(slot)
            if row is not None:
                card["contexts"] = [self._context(reads, row, entry) for entry in range(kept.counts[row])]
            if reads.ngrams is not None and (found := reads.ngrams.of(slot)):
                card["ngrams"] = [[self._texts.text(ids), n] for ids, n in found]
                card["more"] = count - sum(n for _, n in found)

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


def effects(losses: np.ndarray, without: np.ndarray) -> JsonDict:
    """Returns what losses rise by: `knock`, of each token in nats times `KNOCK_UNIT`; `effect`, the mean.

    What is not finite is None, and so is `knock` of the first token.
    """
    with np.errstate(invalid="ignore"):  # of two infinite losses
        risen = without.astype(np.float64) - losses
    return {
        "knock": [round(KNOCK_UNIT * float(x)) if np.isfinite(x) else None for x in risen],
        "effect": rounded(risen[1:].mean(), 3),
    }


def _groups(ways: dict[int, Way]) -> list[list[int]]:
    """Returns the slots that are read by one memory, with weights or without, as lists that are not empty."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for slot, way in ways.items():
        groups.setdefault((way.memory, way.weights is not None), []).append(slot)
    return list(groups.values())
