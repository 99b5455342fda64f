"""A trace has the reads that the definitions of the memories give, and the losses of the logits."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.inspection.models import BASE, MODEL, SMALL, TEXTS, TOKENIZER, variables
from tests.support import engram_oracle, oracle
from tests.support.memory_cases import addressing_of
from ultramem_jax.errors import UserError
from ultramem_jax.inspection import trace
from ultramem_jax.inspection.names import order_of_reads
from ultramem_jax.layers import Memory
from ultramem_jax.models import Transformer
from ultramem_jax.presets import families

TEXT = TEXTS[1]


@pytest.fixture(scope="module")
def passed():
    """The logits, and what each memory gets as its input."""
    inputs = {}

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, Memory) and context.method_name == "__call__":
            inputs[context.module.site.name] = args[0]
        return next_function(*args, **kwargs)

    def run(held, tokens):
        with nn.intercept_methods(record):
            logits = Transformer(MODEL).apply(held, tokens)
        return logits, dict(inputs)

    ids = np.concatenate([[256], TOKENIZER.encode(TEXT)]).astype(np.int32)
    return jax.device_get(jax.jit(run)(variables(), ids[None]))


@pytest.fixture(scope="module")
def traced():
    return trace(MODEL, variables(), TOKENIZER, TEXT)


def test_losses_and_pieces(traced, passed):
    ids = np.concatenate([[256], TOKENIZER.encode(TEXT)])
    np.testing.assert_array_equal(traced.ids, ids)
    assert b"".join(traced.pieces) == TEXT and traced.pieces[0] == b"" and traced.pieces[1] == b"\xff"
    logits = passed[0][0].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -chosen[np.arange(len(ids) - 1), ids[1:]]
    assert np.isnan(traced.losses[0])
    np.testing.assert_allclose(traced.losses[1:], expected, rtol=2e-5)
    assert traced.loss == pytest.approx(expected.mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["ultramem_0", "ring_0", "ring_1"])
def test_reads_of_product_keys_are_the_best_cells_of_the_whole_grid(name, traced, passed):
    site = next(site for site in MODEL.sites if site.name == name)
    own = {part: tree[name] for part, tree in variables().items() if name in tree}
    p, x = oracle.float64(own["params"]), passed[1][name].astype(np.float64)
    cell = addressing_of(Memory(site), own)
    table = variables()["memory"][site.table]
    found, address = traced.memories[name], site.config.address
    assert [head.name for head in found.heads] == ["head 1", "head 2"][: address.num_heads]
    assert found.table == site.table
    for of in oracle.scored(site.config, own, x, MODEL.norm_eps):
        cells, scores = oracle.chosen(site.config, p, of)
        expected = {}
        for (row, column), weights in zip(cells, scores, strict=True):
            block, slot = cell(row, column)
            if "pre_values" in table:
                u = np.asarray(table["pre_values"], np.float64)[slot]
                weights = weights * oracle.inner_value(site.config, p, u, x[of.b, of.s])
            expected[slot, 0 if site.config.readout.sums_blocks else block] = weights
        slots, blocks, weights = (
            found.of_head(array, of.head)[of.s] for array in (found.slots, found.blocks, found.weights)
        )
        places = list(zip(slots.tolist(), blocks.tolist(), strict=True))
        assert set(places) == set(expected)
        for place, weight in zip(places, weights, strict=True):
            np.testing.assert_allclose(weight, expected[place], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.scores, found.weights.mean(-1))


def test_reads_of_ngrams_are_the_hashes(traced):
    site = MODEL.sites[-1]
    found, address = traced.memories["engram_0"], site.config.address
    assert [(head.name, head.order) for head in found.heads] == [("2-grams", 2), ("3-grams", 3)]
    assert order_of_reads(site).tolist() == [2, 2, 3, 3]
    canonical = traced.ids[None] % 200
    factors = engram_oracle.multipliers(address.seed, site.span.start, 200, 3)
    sizes = engram_oracle.table_sizes([40, 40], 2, 1)[0]
    expected = engram_oracle.slots(canonical, 0, factors, sizes, 2)
    np.testing.assert_array_equal(found.slots, expected[0])
    np.testing.assert_array_equal(found.blocks, np.broadcast_to(np.arange(4), found.blocks.shape))
    assert (found.weights == 1).all()


def test_heads_of_other_addresses():
    def names(memory):
        return [tuple(head) for head in memory.address.heads]

    single = families.per_layer_embedding(placement="before@1", value_dim=4)
    assert names(single) == [("single tokens", 1)]
    longer = families.engram(4, placement="before@1", min_order=3, heads_per_order=1, value_dim=4)
    assert names(longer) == [("3-grams", 3), ("4-grams", 4)]
    assert names(families.pkm(placement="1:1", num_heads=3, **SMALL | {"value_dim": 16}))[2] == ("head 3", 0)


def test_refusals():
    with pytest.raises(UserError, match=r"model.memories = \{\}: must name a memory"):
        trace(BASE, {}, TOKENIZER, "a")
    with pytest.raises(UserError, match="text = '': must have at least one token"):
        trace(MODEL, variables(), TOKENIZER, "")
