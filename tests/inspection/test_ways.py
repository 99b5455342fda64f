"""A page looks into the slots of the strongest reads, and a card shows the strongest read of its slot."""

from itertools import zip_longest

import numpy as np
import pytest

from tests.inspection.models import MODEL, TEXTS, TOKENIZER, batches, variables
from ultramem_jax.config.model import table_readers
from ultramem_jax.inspection import corpus_pass, trace
from ultramem_jax.inspection.ways import strengths, strongest_reads, strongest_slots, ways_of

HEAD_ROWS = MODEL.sites[-1].config.address.head_rows(MODEL.sites[-1])


@pytest.fixture(scope="module")
def traced():
    return trace(MODEL, variables(), TOKENIZER, TEXTS[0])


@pytest.fixture(scope="module")
def by(traced):
    return strengths(MODEL, variables(), traced)


def test_the_strongest_reads_of_a_text_come_first(traced, by):
    def of_rank(name, rank):
        """The slots of the reads of a rank within their token and head, strongest first."""
        of, found = traced.memories[name], []
        for token in range(len(traced.ids)):
            for head in range(len(of.heads)):
                reads = [
                    *zip(*(of.of_head(a, head)[token].tolist() for a in (by[name], of.slots)), strict=True)
                ]
                found.append(sorted(reads, key=lambda read: -abs(read[0]))[rank])
        return [(of.table, slot) for _, slot in sorted(found, key=lambda read: -abs(read[0]))]

    first = [of_rank(name, 0) for name in traced.memories]
    expected = list(dict.fromkeys(pair for turn in zip_longest(*first) for pair in turn if pair))
    for most in (0, 12, 30, len(expected)):
        found = strongest_slots(traced, by, most)
        assert {(table, slot) for table, slots in found.items() for slot in slots} == set(expected[:most])
        assert sum(map(len, found.values())) == most
    # A few of them are enough to say something of the whole text.
    few = strongest_slots(traced, by, 12)
    readers = [np.isin(of.slots, few[of.table]).any(1) for of in traced.memories.values()]
    assert all(np.any(readers, axis=0)[part].sum() > 2 for part in (slice(0, 9), slice(9, 18), slice(18, 28)))
    # What is not finite is stronger than all else.
    odd = by["engram_0"].copy()
    odd[7, 1], odd[9, 2] = np.inf, np.nan
    found = strongest_slots(traced, by | {"engram_0": odd}, 8)["engram_0"]
    assert set(found) >= {int(traced.memories["engram_0"].slots[place]) for place in ((7, 1), (9, 2))}
    # Every read is there in the end.
    everything = strongest_slots(traced, by, 10_000)
    assert {table: sorted(slots) for table, slots in everything.items()} == {
        table: traced.slots_of(table).tolist() for table in table_readers(MODEL)
    }


def test_a_slot_is_shown_by_its_strongest_read_wherever_that_is_known(traced, by):
    found = strongest_reads(MODEL, traced, by)
    for table, readers in table_readers(MODEL).items():
        expected = {}
        for site in readers:
            of = traced.memories[site.name]
            for place in np.ndindex(of.slots.shape):
                slot, strength = int(of.slots[place]), abs(by[site.name][place])
                if slot not in expected or strength > expected[slot][0]:
                    expected[slot] = strength, site.name, of.blocks[place], of.weights[place].tolist()
        assert {slot: (*way[:2], way.weights.tolist()) for slot, way in found[table].items()} == {
            slot: tuple(way) for slot, (_, *way) in expected.items()
        }

    corpus = corpus_pass(MODEL, variables(), batches(), {table: range(64) for table in found}, 2)
    for table, of in found.items():
        kept = corpus.tables[table].contexts
        ways = ways_of(MODEL, {table: range(64)}, found, corpus)[table]
        assert all(ways[slot] is of[slot] for slot in range(64) if slot in of)
        only = [slot for slot in range(64) if slot not in of and kept.counts[kept.row_of(slot)]]
        assert len(only) > 3
        for slot in only:
            row = kept.row_of(slot)
            assert ways[slot].block == kept.blocks[row, 0]
            assert ways[slot].memory == corpus.tables[table].memories[kept.memories[row, 0]]
            np.testing.assert_array_equal(ways[slot].weights, kept.weights[row, 0])


def test_a_slot_that_nobody_reads_is_shown_only_if_there_is_one_way_to_read_it():
    first = np.concatenate([[0], np.cumsum(HEAD_ROWS)]).tolist()
    slots = {
        "ultramem_0": [5],  # in any of four blocks
        "ring_tables": [5, 125],  # the window of the first memory ends before 121
        "engram_0": [first[2] - 1, first[2], first[4] - 1, *range(first[4], 184)],  # read j is block j
    }
    found = ways_of(MODEL, slots, {table: {} for table in slots}, None)
    assert found["ultramem_0"] == {5: None}
    assert found["ring_tables"] == {5: ("ring_0", 0, None), 125: ("ring_1", 0, None)}
    assert [way and way.block for way in found["engram_0"].values()] == [1, 2, 3, *[None] * (184 - first[4])]
