"""A knock-out gives the losses of a model whose rows are zero."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.inspection.models import MODEL, TEXTS, TOKENIZER, variables
from ultramem_jax.errors import UserError
from ultramem_jax.inspection import knock_out, knock_out_each, trace
from ultramem_jax.inspection.knock_outs import parse_slots

TEXT = TEXTS[0]


def _zeroed(table, rows):
    held = variables()
    parts = held["memory"][table]
    zeros = jnp.zeros((), parts["values"].dtype)
    parts = parts | {"values": parts["values"].at[jnp.asarray(rows)].set(zeros)}
    return held | {"memory": held["memory"] | {table: parts}}


@pytest.fixture(scope="module")
def traced():
    return trace(MODEL, variables(), TOKENIZER, TEXT)


def _read(traced, memory, count):
    """Slots that the text reads often, so that their effect is not small."""
    slots, times = np.unique(traced.memories[memory].slots, return_counts=True)
    return slots[np.argsort(-times, kind="stable")[:count]].tolist()


@pytest.mark.parametrize("memory", ["ultramem_0", "ring_1", "engram_0"])
def test_losses_without_slots_are_those_of_rows_of_zeros(memory, traced):
    table, slots = traced.memories[memory].table, _read(traced, memory, 2)
    found = knock_out(MODEL, variables(), TOKENIZER, TEXT, {memory: [*slots, slots[0]], table: slots})
    assert {name: of.tolist() for name, of in found.slots.items()} == {table: sorted(slots)}
    np.testing.assert_array_equal(found.ids, traced.ids)
    expected = trace(MODEL, _zeroed(table, slots), TOKENIZER, TEXT)
    np.testing.assert_allclose(found.losses, traced.losses, rtol=1e-5)
    np.testing.assert_allclose(found.without, expected.losses, rtol=1e-5)
    assert np.nanmax(np.abs(found.without - found.losses)) > 1e-3
    assert found.effect == pytest.approx(expected.loss - traced.loss, abs=1e-6)
    assert found.without[0] != found.without[0]  # no loss of the first token
    losses = f"{found.losses[1:].mean():.4f} -> {found.without[1:].mean():.4f} nats per token"
    assert found.in_words() == f"{losses} ({found.effect:+.2g})"


def test_one_at_a_time(traced):
    slots = [
        (memory, slot)
        for memory in ("ultramem_0", "ring_tables", "engram_0")
        for slot in _read(traced, {"ring_tables": "ring_0"}.get(memory, memory), 1)
    ]
    unread = np.setdiff1d(np.arange(64), traced.slots_of("ultramem_0"))[:2].tolist()
    slots += [("ultramem_0", slot) for slot in unread]
    counted = []
    losses, found = knock_out_each(
        MODEL, variables(), TOKENIZER, TEXT, slots, batch_size=2, progress=counted.append
    )
    assert found.shape == (5, len(traced.ids)) and counted == [1, 2, 2]
    for (table, slot), without in zip(slots, found, strict=True):
        expected = trace(MODEL, _zeroed(table, [slot]), TOKENIZER, TEXT)
        np.testing.assert_allclose(without, expected.losses, rtol=1e-5)
    # A slot that is not read has no effect, to the bit.
    np.testing.assert_array_equal(found[3:], np.stack([losses, losses]))


def test_slots_by_name():
    assert parse_slots(MODEL, "--knock_out", ["ring_1:3", "ring_tables:9", "engram_0:0"]) == {
        "ring_tables": [3, 9],
        "engram_0": [0],
    }
    for entry, said in {
        "ultramem_0": "--knock_out = 'ultramem_0': must be MEMORY:SLOT, such as ultramem_0:0",
        "ultramem_0:x": "--knock_out = 'ultramem_0:x': must be",
        "ultramem_0:64": r"slot of ultramem_0 = 64: must be in \[0, 64\)",
        "ultramen_0:1": "unknown memory 'ultramen_0': did you mean 'ultramem_0'",
    }.items():
        with pytest.raises(UserError, match=said):
            parse_slots(MODEL, "--knock_out", [entry])
