"""One pass over a corpus keeps what a dictionary of all reads would give."""

import collections

import numpy as np
import pytest

from tests.inspection.models import MODEL, TEXTS, TOKENIZER, batches, variables
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import UserError
from ultramem_jax.inspection import corpus_pass, ngrams, trace
from ultramem_jax.inspection.contexts import Found
from ultramem_jax.inspection.names import order_of_reads

K = 3


@pytest.fixture(scope="module")
def everything():
    """Per table all reads: (slot, score, position in the corpus, memory, block, n-gram, weights)."""
    traces = {text: trace(MODEL, variables(), TOKENIZER, text) for text in TEXTS}
    reads, position = collections.defaultdict(list), 0
    for batch in batches():
        for row in batch:
            length = int((row >= 0).sum())
            text = next(
                (text for text in TEXTS if length and TOKENIZER.decode(row[:length]) == text[: length - 1]),
                None,
            )
            for token in range(length):
                for table, sites in table_readers(MODEL).items():
                    for number, site in enumerate(sites):
                        of = traces[text].memories[site.name]
                        for j, order in enumerate(order_of_reads(site)):
                            ngram = (
                                tuple([*[-1] * int(order), *row[: token + 1].tolist()][-int(order) :])
                                if order
                                else ()
                            )
                            reads[table].append(
                                (
                                    int(of.slots[token, j]),
                                    float(of.scores[token, j]),
                                    position + token,
                                    number,
                                    int(of.blocks[token, j]),
                                    ngram,
                                    of.weights[token, j],
                                )
                            )
            position += len(row)
    return reads


@pytest.fixture(scope="module")
def chosen(everything):
    return {table: sorted({slot for slot, *_ in reads})[::3] for table, reads in everything.items()}


@pytest.fixture(scope="module")
def passed(chosen):
    return corpus_pass(MODEL, variables(), iter(batches()), chosen, K, most=4, ngrams=5, before=4, after=2)


def test_counts(passed, everything):
    assert passed.num_tokens == sum(int((batch >= 0).sum()) for batch in batches())
    for table, reads in everything.items():
        counted = collections.Counter(slot for slot, *_ in reads)
        found = passed.tables[table]
        assert {slot: int(n) for slot, n in enumerate(found.counts) if n} == dict(counted)
        expected = sorted(counted, key=lambda slot: (-counted[slot], slot))[:4]
        assert found.most_read.tolist() == expected
        assert set(found.most_read) <= set(found.contexts.slots)


def test_contexts(passed, everything, chosen):
    flat = np.concatenate([batch.reshape(-1) for batch in batches()])
    length = batches()[0].shape[1]
    for table, reads in everything.items():
        by_token = collections.defaultdict(dict)
        for slot, score, position, memory, block, _, weights in reads:
            before = by_token[slot].get(position)
            if before is None or abs(score) > abs(before[0]):
                by_token[slot][position] = score, memory, block, weights
        kept = passed.tables[table].contexts
        assert set(chosen[table]) <= set(kept.slots)
        for row, slot in enumerate(kept.slots.tolist()):
            if slot not in chosen[table]:
                continue
            expected = sorted(by_token[slot].items(), key=lambda item: (-abs(item[1][0]), item[0]))[:K]
            assert kept.counts[row] == len(expected)
            for entry, (position, (score, memory, block, weights)) in enumerate(expected):
                np.testing.assert_allclose(kept.scores[row, entry], score, rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(kept.weights[row, entry], weights, rtol=1e-4, atol=1e-6)
                assert (kept.memories[row, entry], kept.blocks[row, entry]) == (memory, block)
                begin = position - position % length
                there = [
                    flat[i] if begin <= i < begin + length else -1 for i in range(position - 4, position + 3)
                ]
                assert kept.windows[row, entry].tolist() == there


def test_ngrams_on_a_row(passed, everything, chosen):
    assert passed.tables["ultramem_0"].ngrams is None
    found, shared = passed.tables["engram_0"].ngrams, 0
    for slot in chosen["engram_0"]:
        counted = collections.Counter(ngram for at, *_, ngram, _ in everything["engram_0"] if at == slot)
        assert found.of(slot) == sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:5]
        shared += len(counted) > 1
    assert shared > 3
    assert all(found.of(slot) for slot in passed.tables["engram_0"].most_read.tolist())
    assert found.of(max(chosen["engram_0"]) + 1000) == []


def test_ngrams_of_a_slot_have_a_bounded_number_of_counters(monkeypatch):
    monkeypatch.setattr(ngrams, "_APART", 2)
    rows = ngrams.SharedRows(np.array([3]), 1)
    tokens = np.array([[7, 8, 9, 8, 8]])
    slots, positions = np.full(5, 3), np.arange(5)
    found = Found(slots, slots, positions, slots, np.zeros(5, int), slots, slots)
    rows.add(found, np.array([1]), tokens)
    assert rows.of(3) == [((8,), 3)]  # 9 comes last, and is not counted
    rows.track(np.array([3, 4]))
    assert rows.of(3) == [((8,), 3)] and rows.of(4) == []
    rows.track(np.array([4]))
    rows.track(np.array([3]))
    assert rows.of(3) == []


def test_slots_that_begin_to_lead_are_followed_from_then_on():
    found = corpus_pass(MODEL, variables(), iter(batches()), {}, 2, most=1)
    for of in found.tables.values():
        assert len(of.contexts.slots) <= 8 and len(of.most_read) == 1
        (row,) = np.flatnonzero(of.contexts.slots == of.most_read[0])
        assert of.contexts.counts[row] == 2


def test_refusals():
    with pytest.raises(UserError, match="batches = 0: must be at least 1"):
        corpus_pass(MODEL, variables(), [])
    with pytest.raises(UserError, match="unknown memory 'x'"):
        corpus_pass(MODEL, variables(), [], {"x": [1]})
