"""The page shows what the analyses found, in a browser, for any text and for tables of millions of slots."""

import json
import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.inspection.browser import visit
from tests.inspection.models import BASE, MODEL, TEXTS, TOKENIZER, batches, variables
from tests.support.drawn import variables_of
from ultramem_jax.data import ByteTokenizer
from ultramem_jax.errors import UserError
from ultramem_jax.inspection import corpus_pass, knock_out, page, promoted_tokens, trace
from ultramem_jax.inspection.pages import render
from ultramem_jax.inspection.texts import TokenTexts, visible
from ultramem_jax.inspection.ways import strengths, strongest_reads
from ultramem_jax.presets import families

__all__ = ["visit"]

TITLE = "</title><script>fail()</script>"
RECORDS = [
    {"step": 10 * i, "ultramem_0/read_entropy": 3 + i / 100, "ultramem_0/slots_read_share": i / 500}
    for i in range(500)
]


def data_of(written):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', written, re.DOTALL)[1]
    )


@pytest.fixture(scope="module")
def knocked_out():
    return knock_out(MODEL, variables(), TOKENIZER, TEXTS[1], {"ultramem_0": [4, 3, 4]})


@pytest.fixture(scope="module")
def written(knocked_out):
    return page(
        MODEL,
        variables(),
        TOKENIZER,
        TEXTS[1],
        batches=batches(),
        records=RECORDS,
        title=TITLE,
        corpus_name="a corpus\x00",
        knocked_out=knocked_out,
        cards=12,
        contexts=2,
        neighbours=2,
        most=4,
    )


@pytest.fixture(scope="module")
def traced():
    return trace(MODEL, variables(), TOKENIZER, TEXTS[1])


def test_readers_of_a_slot_are_known_whatever_is_shown(traced):
    few = data_of(page(MODEL, variables(), TOKENIZER, TEXTS[1], cards=6, neighbours=0, reads=1))
    assert all(len(reads) == 1 for of in few["memories"].values() for heads in of["reads"] for reads in heads)
    for name, of in few["memories"].items():
        known = {read[0] for heads in of["reads"] for reads in heads for read in reads}
        known |= {int(slot) for slot in few["tables"][of["table"]]["cards"]}
        told = {(read[0], t) for t, heads in enumerate(of["reads"]) for reads in heads for read in reads}
        told |= {(slot, token) for slot, token, _ in of["weaker"]}
        slots = traced.memories[name].slots
        everything = {(int(slot), t) for t, row in enumerate(slots) for slot in row}
        assert {pair for pair in everything if pair[0] in known} <= told <= everything


def test_the_data_are_those_of_the_analyses(written, traced, knocked_out):
    data = data_of(written)
    assert [token["loss"] for token in data["tokens"]][1:] == pytest.approx(
        traced.losses[1:].tolist(), rel=1e-3
    )
    assert data["tokens"][0] == {"text": "⟨end of text⟩", "loss": None, "special": 1}
    for name, of in traced.memories.items():
        shown = data["memories"][name]
        assert shown["table"] == of.table and len(shown["heads"]) == len(of.heads)
        if name == "engram_0":
            continue
        for head in range(len(of.heads)):
            scores, slots = of.of_head(of.scores, head), of.of_head(of.slots, head)
            for token, reads in enumerate(shown["reads"]):
                order = np.argsort(-np.abs(scores[token]), kind="stable")
                assert [slot for slot, *_ in reads[head]] == slots[token, order].tolist()
                assert [score for _, score, *_ in reads[head]] == pytest.approx(
                    scores[token, order].tolist(), rel=1e-2, abs=1e-6
                )
    found = corpus_pass(MODEL, variables(), batches(), {}, most=4)
    assert data["corpus"] == {"tokens": found.num_tokens, "name": "a corpus\\x00"}
    for name, table in data["tables"].items():
        counts = found.tables[name].counts
        assert [slot for slot, _ in table["usage"]["most"]] == found.tables[name].most_read.tolist()
        assert all(count == counts[int(slot)] for slot, count in table["counts"].items())
        for slot, card in table["cards"].items():
            assert card["count"] == counts[int(slot)]
            if card["count"]:
                assert card["rank"] == 1 + (counts > counts[int(slot)]).sum()
            assert len(card["near"]) == 2
            if name == "engram_0":
                assert card["more"] == card["count"] - sum(count for _, count in card["ngrams"])
    cards = data["tables"]["ultramem_0"]["cards"]
    assert {"3", "4"} <= set(cards) and sum(
        len(of["cards"]) for of in data["tables"].values()
    ) <= 12 + 2 + 3 * 4
    steps, values = data["tables"]["ultramem_0"]["curves"]["read_entropy"]
    assert len(steps) <= 201 and (steps[-1], values[-1]) == (4990, 7.99)
    expected = (knocked_out.without - knocked_out.losses)[1:] * data["knock_unit"]
    assert data["knocked"] == [None, *(round(float(of)) for of in expected)]


def test_a_card_shows_the_strongest_read_of_its_slot(written, traced):
    tables, texts = data_of(written)["tables"], TokenTexts(TOKENIZER)
    reads = strongest_reads(MODEL, traced, strengths(MODEL, variables(), traced))
    weights = set()
    for table, ways in reads.items():
        cards = {int(slot): card for slot, card in tables[table]["cards"].items() if int(slot) in ways}
        assert len(cards) > 3
        for slot, card in cards.items():
            way = ways[slot]
            assert (card["memory"], card["block"]) == (way.memory, way.block)
            if table == "engram_0":
                assert "weight" not in card
            else:
                assert card["weight"] == pytest.approx(way.weights.mean(), rel=1e-3)
                weights.add(card["weight"] > 0)
            found = promoted_tokens(
                MODEL, variables(), way.memory, [slot], 8, blocks=[way.block], weights=way.weights[None],
                vocab_size=257,
            )  # fmt: skip
            for kind, ids, scores in (("up", *found[:2]), ("down", *found[2:])):
                assert [token for token, _ in card[kind]] == [texts.token(int(i)) for i in ids[0]]
                assert [score for _, score in card[kind]] == pytest.approx(scores[0].tolist(), rel=1e-2)
    assert weights == {False, True}


def test_a_card_of_a_slot_that_nobody_reads_does_not_say_what_it_promotes(traced):
    slots = {
        name: np.setdiff1d(np.arange(41, 64), traced.slots_of(name))[:1].tolist()
        for name in ("ultramem_0", "engram_0")
    }
    out = knock_out(MODEL, variables(), TOKENIZER, TEXTS[1], slots)
    found = data_of(page(MODEL, variables(), TOKENIZER, TEXTS[1], cards=0, knocked_out=out, neighbours=2))[
        "tables"
    ]
    (card,), (of_engram,) = (found[name]["cards"].values() for name in slots)
    # In any of four blocks; a row of Engram is always read in the same one, here that after 41 rows.
    assert set(card) == {"near"} and [words for *_, words in card["near"]] == [[], []]
    assert of_engram["block"] == 1 and len(of_engram["up"]) == 8 and "effect" not in of_engram


@pytest.fixture(scope="module")
def broken(traced):
    """A page of a model in which a row of each kind of table is not finite, and these rows."""
    held = variables()
    names = ("ultramem_0", "ring_tables", "engram_0")
    slots = {name: int(traced.slots_of(name)[3]) for name in names}
    numbers = dict(zip(names, (np.uint16(0x7FC0), np.nan, np.inf), strict=True))  # the first are bits of NaN
    tables = {}
    for name in names:
        table = held["memory"][name]
        tables[name] = table | {"values": table["values"].at[slots[name]].set(numbers[name])}
    held = held | {"memory": tables}
    out = knock_out(MODEL, held, TOKENIZER, TEXTS[1], {name: [slot] for name, slot in slots.items()})
    shown = page(MODEL, held, TOKENIZER, TEXTS[1], batches=batches(), knocked_out=out, cards=12, neighbours=2)
    return shown, slots


def test_a_model_with_rows_that_are_not_finite(broken):
    written, slots = broken
    data = data_of(written)
    # Masked attention weighs what is not finite by zero, which is not finite.
    assert all(token["loss"] is None for token in data["tokens"])
    assert "28 tokens, the losses of 27 are not finite." in data["note"]
    shown = [read for heads in data["memories"]["engram_0"]["reads"] for reads in heads for read in reads]
    assert {read[1] for read in shown if read[0] == slots["engram_0"]} == {None}
    for table, slot in slots.items():
        cards = data["tables"][table]["cards"]
        card = cards.pop(str(slot))
        assert card["up"] is None and card["down"] is None and card["near"] == []
        assert len(cards) > 3 and all(slot not in [near for near, *_ in of["near"]] for of in cards.values())


def test_a_knock_out_of_another_text_is_refused(knocked_out):
    with pytest.raises(UserError, match=r"knocked_out.ids = array.*: must be the tokens of the text"):
        page(MODEL, variables(), TOKENIZER, TEXTS[0], knocked_out=knocked_out)


def test_nothing_leaves_its_place(written):
    assert written.count("</script>") == 2 and "<script>fail" not in written
    assert written.count("</title>") == 1
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", written)
    assert written.isprintable() or all(c.isprintable() or c == "\n" for c in written)


def test_text_that_can_be_seen():
    assert visible("a\tb\r\x00\x7f\x85\u202e\u2028\ue000") == "a⇥b\\x0d\\x00\\x7f\\u0085\\u202e\\u2028\\ue000"
    texts = TokenTexts(ByteTokenizer())
    assert texts.token(0xE2) == "\\xe2" and texts.token(256) == "⟨end of text⟩"
    assert texts.text([-1, *"é\n".encode(), 0xFF, 256, 65]) == "é↵\ufffd⟨end of text⟩A"
    assert texts.token(300) == "⟨300⟩"


def test_a_page_without_a_corpus(traced):
    found = data_of(page(MODEL, variables(), TOKENIZER, TEXTS[1], cards=0, neighbours=0))
    assert found["corpus"] is None and all(not table["cards"] for table in found["tables"].values())
    with pytest.raises(UserError, match="reads = 0: must be at least 1"):
        page(MODEL, variables(), TOKENIZER, TEXTS[1], reads=0)


CLICKS = """(found) => {
  const tokens = [...document.querySelectorAll("#tokens button")];
  const all = (query) => [...document.querySelectorAll(query)];
  const slots = () => all("#list button").map((button) => Number(button.dataset.slot));
  const text = (query) => document.querySelector(query).textContent;
  found.tokens = tokens.map((button) => button.textContent);
  found.scripts = document.scripts.length;
  found.title = document.title;
  found.note = text("#text-note");
  found.colour = text("#choose-colour [aria-pressed=true]");
  tokens[3].click();
  found.chosen = tokens[3].getAttribute("aria-pressed");
  found.slots = slots();
  document.querySelector("#list button:nth-child(2)").click();
  found.slot = text("#card h2");
  found.card = text("#card");
  found.marks = document.querySelectorAll("#card .context mark").length;
  // A slot that was looked into, so that all colours are there.
  for (const token of tokens) {
    token.click();
    const known = document.querySelector("#list button:not(.plain)");
    if (known) { known.click(); found.looked = Number(known.dataset.slot); break; }
  }
  found.colours = all("#choose-colour button").map((button) => {
    button.click();
    const shares = tokens.map((token) => Number(token.style.getPropertyValue("--share")));
    return [text("#choose-colour [aria-pressed=true]"), shares.flatMap((share, i) => share > 0 ? [i] : [])];
  });
  // This token reads a slot twice, in two blocks.
  all("#choose-head button")[1].click();
  tokens[5].click();
  found.twice = slots();
  document.querySelector("#list button").focus();
  found.visited = found.twice.map(() => {
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
    return all("#list button").findIndex((one) => one === document.activeElement && one.tabIndex === 0);
  });
  tokens[3].click();
  tokens[3].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  found.right = tokens.findIndex((token) => token.getAttribute("aria-pressed") === "true");
  found.focused = document.activeElement === tokens[4];
  tokens[4].dispatchEvent(new KeyboardEvent("keydown", { key: "End", bubbles: true }));
  found.last = tokens.findIndex((token) => token.getAttribute("aria-pressed") === "true");
  all("#choose-memory button").find((button) => button.textContent === "engram_0").click();
  found.heads = all("#choose-head button").map((button) => button.textContent);
  found.engram = text("#card");
  document.querySelector("#tab-tables").click();
  found.hidden = [document.querySelector("#view-text").hidden, document.querySelector("#view-tables").hidden];
  found.tiles = all("#tiles .tile b").map((tile) => tile.textContent);
  found.plots = document.querySelectorAll("#plots svg path.curve").length;
  found.broken = document.querySelectorAll("svg [d*=NaN], svg [x1=NaN], svg [cy=NaN]").length;
  found.most = slots();
  found.address = location.hash;
  all("#choose-table button").find((button) => button.textContent === "ultramem_0").click();
  found.curves = document.querySelectorAll("#plots svg path.curve").length;
  found.whole = document.querySelectorAll("svg [d*=NaN], svg [x1=NaN], svg [cy=NaN]").length === 0;
}"""


def test_clicks_in_a_browser(visit, written, traced):
    found = visit(written, CLICKS)
    assert found["failures"] == [] and found["fetched"] == []
    texts = TokenTexts(TOKENIZER)
    assert found["tokens"] == [texts.token(int(i)) for i in traced.ids]
    assert found["scripts"] == 4 and found["title"].startswith(TITLE)
    of = traced.memories["ultramem_0"]
    scores, slots = of.of_head(of.scores, 0)[3], of.of_head(of.slots, 0)[3]
    expected = slots[np.argsort(-np.abs(scores), kind="stable")].tolist()
    assert found["chosen"] == "true" and found["slots"] == expected
    assert found["slot"] == f"Slot {expected[1]}"
    assert found["colour"] == "Knock-out" and re.match(
        r"Knocked out: ultramem_0:3, ultramem_0:4\. Mean loss \d\.\d{4} → \d\.\d{4} nats per token "
        r"\([+−]0\.\d{4}\)\. 28 tokens, mean loss \d\.\d{3} nats, ",
        found["note"],
    )
    colours = dict(found["colours"])
    assert [*colours] == ["Loss", "Weight of the slot", "Loss without the slot", "Knock-out"]
    assert colours["Loss"] == [*range(1, len(traced.ids))]
    # Every head and token that reads the slot, unless its weight is so small that it has no colour.
    largest = np.abs(np.where(of.slots == found["looked"], of.scores, 0)).max(1)
    assert colours["Weight of the slot"] == np.flatnonzero(82 * largest / largest.max() > 0.05).tolist()
    assert min(map(len, colours.values())) > 0
    assert len(set(found["twice"])) == len(found["twice"]) - 1 == 3
    assert found["visited"] == [1, 2, 3, 3]
    assert (found["right"], found["focused"], found["last"]) == (4, True, len(traced.ids) - 1)
    assert found["heads"] == ["2-grams", "3-grams"] and "tokens here" in found["engram"]
    assert found["hidden"] == [True, False] and found["tiles"][0] == f"{MODEL.sites[-1].num_slots}"
    assert found["plots"] == 1 and found["broken"] == 0
    # Reads by rank, and over training the entropy and the share of slots read.
    assert found["curves"] == 3 and found["whole"]
    data = data_of(written)
    assert found["most"] == [slot for slot, _ in data["tables"]["engram_0"]["usage"]["most"]]
    assert "memory=engram_0" in found["address"] and "tab=tables" in found["address"]


CARD = """(found) => {
  found.titles = [...document.querySelectorAll("#tokens button")].map((button) => button.title);
  found.card = document.querySelector("#card").textContent;
  found.marks = document.querySelectorAll("#card .context mark").length;
  found.bars = document.querySelectorAll("#card .scores .bar").length;
  found.effect = document.querySelectorAll("#card svg rect").length;
  const near = [...document.querySelectorAll("#card .near > *")];
  found.near = near.map((row) => row.tagName + row.firstChild.textContent);
  found.said = document.querySelector("[role=status]").textContent;
  const button = document.querySelector("#choose-head button:last-child");
  button?.focus();
  button?.click();
  found.focused = document.activeElement.textContent;
  found.tiles = [...document.querySelectorAll("#tiles .tile b")].map((tile) => tile.textContent);
}"""


def test_the_card_of_a_slot_that_an_address_names(visit, written, traced, broken):
    data = data_of(written)
    slot, card = next(
        (slot, card)
        for slot, card in data["tables"]["engram_0"]["cards"].items()
        if card.get("knock") and card["contexts"]
    )
    found = visit(written, CARD, f"#memory=engram_0&table=engram_0&slot={slot}&token=5")
    assert found["failures"] == []
    assert found["card"].startswith(f"Slot {slot}") and f"read {card['count']}×" in found["card"]
    assert found["marks"] == len(card["contexts"]) and found["bars"] == 16
    known = data["tables"]["engram_0"]["cards"]
    assert found["near"] == [
        ("BUTTON" if str(near) in known else "DIV") + f"{near:,}" for near, *_ in card["near"]
    ]
    promoted = ", ".join(token for token, _ in card["up"][:5])
    assert found["said"] == f"Slot {slot} of engram_0, promotes {promoted}"
    assert found["focused"] == "3-grams"
    assert found["effect"] == 2 * len(traced.ids)
    assert "N-grams on this row" in found["card"]
    shown, _ = broken
    nonsense = visit(shown, CARD, "#memory=x&table=y&slot=-1&token=1e9&tab=z&colour=w")
    assert nonsense["failures"] == [] and nonsense["card"].startswith("Slot ")
    assert nonsense["titles"][0] == "starts the text" and nonsense["titles"][-1] == "loss not finite"


def test_twenty_million_slots(visit):
    memory = families.pkm(
        placement="1:1",
        num_keys=4473,
        top_m=8,
        num_heads=1,
        key_dim=8,
        value_dim=8,
        dtype="bfloat16",
        project_values=True,
    )
    model = replace(BASE, num_layers=1, memories={"pkm": memory})
    num_slots = model.sites[0].num_slots
    assert num_slots > 20_000_000
    # Rows as random bits: to draw so many normal numbers would take longer than all else.
    held, rng = (
        variables_of(replace(model, memories={"pkm": memory.changed(num_keys=8)})),
        np.random.default_rng(0),
    )
    bits = np.frombuffer(bytearray(rng.bytes(16 * num_slots)), np.uint16).reshape(num_slots, 8)
    bits &= np.uint16(0x80FF)
    bits |= np.uint16(0x3D00)  # numbers of 0.03 to 0.12, with any sign
    keys = rng.standard_normal(model.sites[0].parameters["keys"].shape, np.float32)
    params = held["params"] | {"pkm_0": held["params"]["pkm_0"] | {"keys": jnp.asarray(keys)}}
    held = held | {"params": params, "memory": {"pkm_0": {"values": jnp.asarray(bits)}}}
    corpus = np.random.default_rng(1).integers(0, 256, (2, 2, 32)).astype(np.int32)
    found = page(
        model, held, TOKENIZER, b"twenty million slots", batches=corpus, cards=10, neighbours=3, most=4
    )
    assert len(found) < 300_000
    seen = visit(found, CARD, "#tab=tables")
    assert seen["failures"] == [] and seen["fetched"] == []
    assert seen["tiles"][0] == f"{num_slots:,}" and len(seen["near"]) == 3 and seen["bars"] == 16


def test_render_of_any_text():
    hostile = "</script><!--data--><!--js-->\u2028\ud800&amp;"
    written = render("t", {"a": hostile})
    assert data_of(written) == {"a": hostile} and written.count("</script>") == 2
