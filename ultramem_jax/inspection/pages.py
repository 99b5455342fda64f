"""Writes what there is to see in a memory as one HTML file, which opens without a network.

    html = page(config, variables, tokenizer, "The capital of France is Paris")
    pathlib.Path("inspect.html").write_text(html)

In a notebook, `IPython.display.IFrame("inspect.html", "100%", 900)` shows the file. The page holds the text's
reads and cards of slots, and no table: its size does not grow with a table.
"""

import html
import importlib.resources
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.data import Tokenizer
from ultramem_jax.errors import at_least, require
from ultramem_jax.inspection.cards import KNOCK_UNIT, Cards, Progress, effects, rounded
from ultramem_jax.inspection.corpus import CorpusReads, corpus_pass
from ultramem_jax.inspection.knock_outs import KnockOut
from ultramem_jax.inspection.names import site_of
from ultramem_jax.inspection.texts import TokenTexts, visible
from ultramem_jax.inspection.tracing import MemoryReads, Trace, trace
from ultramem_jax.inspection.usage import training_curves, usage
from ultramem_jax.inspection.ways import strength_of, strengths, strongest_reads, strongest_slots, ways_of
from ultramem_jax.tree_types import JsonDict, Variables

_PROMOTED = 8
"""Tokens that a card says a slot promotes, and suppresses."""
_NAMED = 12
"""Slots of a knock-out that are named."""
_CURVE_POINTS = 200
"""Most points of a curve over training."""
_MARK = re.compile(r"<!--(title|css|js|data)-->")


def _silent(what: str, total: int) -> Any:
    return lambda done: None


def page(
    config: ModelConfig,
    variables: Variables,
    tokenizer: Tokenizer,
    text: str | bytes,
    *,
    batches: Iterable[np.ndarray] | None = None,
    records: Iterable[Mapping[str, object]] = (),
    knocked_out: KnockOut | None = None,
    title: str = "a model with memory",
    corpus_name: str = "the corpus",
    corpus_tokens: int = 0,
    cards: int = 400,
    reads: int = 12,
    contexts: int = 5,
    neighbours: int = 5,
    most: int = 16,
    progress: Progress = _silent,
) -> str:
    """Returns a page that shows what a text reads, as one self-contained HTML document.

    Args:
        config: the model's config.
        variables: its `params`, `memory` and `buffers`.
        tokenizer: its tokenizer.
        text: the text, as for `trace`.
        batches: a corpus, as for `corpus_pass`; None leaves out what needs one.
        records: lines of the run's `metrics.jsonl`, for the curves over training.
        knocked_out: the result of `knock_out` for this text, to be shown.
        title: name of the model.
        corpus_name: name of the corpus.
        corpus_tokens: tokens of the corpus, only for the progress.
        cards: slots of the text to look into, those of its strongest reads: first of the strongest one of
            each token, memory and head, then of the second ones, and so on.
        reads: reads of a token and head that are shown, the strongest ones.
        contexts: contexts of a slot.
        neighbours: nearest slots of a slot.
        most: slots of each table that are shown as those read most.
        progress: called at the beginning of each long part of the work.

    Raises:
        UserError: as for `trace` and `corpus_pass`; a number is too small; `knocked_out` is of another text.
    """
    at_least(1, reads=reads, contexts=contexts, most=most)
    at_least(0, cards=cards, neighbours=neighbours)
    traced = trace(config, variables, tokenizer, text)
    by = strengths(config, variables, traced)
    slots = strongest_slots(traced, by, cards)
    if knocked_out is not None:
        same = np.array_equal(knocked_out.ids, traced.ids)
        require(same, "knocked_out.ids", knocked_out.ids, "must be the tokens of the text")
        for table, of_table in knocked_out.slots.items():
            slots[table] += of_table.tolist()
    corpus = None
    if batches is not None:
        corpus = corpus_pass(
            config,
            variables,
            batches,
            slots,
            contexts,
            most=most,
            progress=progress("corpus", corpus_tokens),
        )
        for table, reads_of_table in corpus.tables.items():
            slots[table] += reads_of_table.most_read.tolist()
    made = Cards(config, variables, tokenizer, _PROMOTED).make(
        ways_of(config, slots, strongest_reads(config, traced, by), corpus),
        corpus,
        traced,
        text,
        neighbours,
        progress,
    )
    texts = TokenTexts(tokenizer)
    memories = {name: _memory(config, name, of, by[name], reads) for name, of in traced.memories.items()}
    _without_unknown(memories, made)
    data: JsonDict = {
        "subtitle": f"{visible(title)} · {_in_words(config)}",
        "note": _note(traced),
        "tokens": [_token(traced, texts, i) for i in range(len(traced.ids))],
        "memories": memories,
        "tables": _tables(config, corpus, made, records, traced, most),
        "corpus": None if corpus is None else {"tokens": corpus.num_tokens, "name": visible(corpus_name)},
        "knock_unit": KNOCK_UNIT,
    }
    if knocked_out is not None and knocked_out.slots:
        data["knocked"] = effects(knocked_out.losses, knocked_out.without)["knock"]
        data["note"] = f"{_knocked(knocked_out)} {data['note']}"
    return render(title, data)


def render(title: str, data: JsonDict) -> str:
    """Returns the page that shows data for its script; titles and data may hold any text."""
    folder = importlib.resources.files(__package__) / "page"
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    # As JSON in ASCII, and without the characters that end an element, no text can leave its place.
    written = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    named = html.escape(f"{visible(title)} · inside a memory")
    fills = {"title": named, "css": parts["css"], "js": parts["js"], "data": written}
    return _MARK.sub(lambda match: fills[match[1]], parts["html"])


def _in_words(config: ModelConfig) -> str:
    memories = [f"{name} ({', '.join(memory.in_words())})" for name, memory in config.memories.items()]
    return f"{config.num_layers} layers of width {config.embed_dim} · {'; '.join(memories)}"


def _note(traced: Trace) -> str:
    number, losses = f"{len(traced.ids):,} tokens", traced.losses[1:].astype(np.float64)
    broken = int((~np.isfinite(losses)).sum())
    bits = 0.0 if broken else float(losses.sum()) / np.log(2) / traced.num_bytes
    means = f"mean loss {traced.loss:.3f} nats, {bits:.2f} bits per byte"
    said = f"the losses of {broken:,} are not finite" if broken else means
    return f"{number}, {said}. Arrow keys move between tokens; underlined tokens read the slot that is shown."


def _knocked(found: KnockOut) -> str:
    """Returns a sentence about the slots that are missing, and the loss with and without them."""
    names = [f"{table}:{slot}" for table, slots in found.slots.items() for slot in slots.tolist()]
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    losses = found.in_words().replace("->", "→").replace("-", "−")
    return f"Knocked out: {', '.join(names[:_NAMED])}{more}. Mean loss {losses}."


def _token(traced: Trace, texts: TokenTexts, i: int) -> JsonDict:
    token = int(traced.ids[i])
    shown: JsonDict = {"text": texts.token(token), "loss": rounded(traced.losses[i])}
    if texts.is_special(token):
        shown["special"] = 1
    elif b"\n" in traced.pieces[i]:
        shown["line"] = 1
    return shown


def _memory(config: ModelConfig, name: str, of: MemoryReads, scores: np.ndarray, most: int) -> JsonDict:
    """Returns the reads of a text in one memory: the strongest of each token and head, and the weaker."""
    site = site_of(config, name)
    weighs = site.config.varying_weights > 0
    in_blocks = site.config.num_blocks > 1 and not site.config.reads_apart
    per_head = of.slots.shape[1] // len(of.heads)
    tokens, weaker = [], []
    for token in range(len(of.slots)):
        heads = []
        for head in range(len(of.heads)):
            numbers = np.arange(head * per_head, (head + 1) * per_head)
            order = numbers[np.argsort(-strength_of(scores[token, numbers]), kind="stable")]
            heads.append([_read(of, scores, token, read, weighs, in_blocks) for read in order[:most]])
            weaker += [
                [int(of.slots[token, read]), token, rounded(scores[token, read], 3)] for read in order[most:]
            ]
        tokens.append(heads)
    measure = "weight of each read" if weighs else "length of each row, as rows have no weights here"
    if weighs and of.weights.shape[2] > 1:
        measure = f"mean of the {of.weights.shape[2]} weights of each read"
    return {
        "table": of.table,
        "heads": [head.name for head in of.heads],
        "weighs": weighs,
        "measure": measure,
        "per_head": per_head,
        "cut": per_head > most,
        "reads": tokens,
        "weaker": weaker,
    }


def _without_unknown(memories: JsonDict, cards: Mapping[str, Collection[int]]) -> None:
    """Leaves out weaker reads of slots that the page shows nowhere."""
    known = {table: set(of) for table, of in cards.items()}
    for memory in memories.values():
        for heads in memory["reads"]:
            known[memory["table"]].update(read[0] for reads in heads for read in reads)
    for memory in memories.values():
        memory["weaker"] = [read for read in memory["weaker"] if read[0] in known[memory["table"]]]


def _read(
    of: MemoryReads, scores: np.ndarray, token: int, read: int, weighs: bool, in_blocks: bool
) -> list[Any]:
    block = int(of.blocks[token, read]) if in_blocks else None
    shown: list[Any] = [int(of.slots[token, read]), rounded(scores[token, read], 3), block]
    if weighs and of.weights.shape[2] > 1:
        shown.append([rounded(weight, 3) for weight in of.weights[token, read]])
    return shown


def _tables(
    config: ModelConfig,
    corpus: CorpusReads | None,
    cards: dict[str, dict[int, JsonDict]],
    records: Iterable[Mapping[str, object]],
    traced: Trace,
    most: int,
) -> JsonDict:
    curves = training_curves(config, records)
    tables: JsonDict = {}
    for table, readers in table_readers(config).items():
        memory = readers[0].config
        tables[table] = {
            "slots": readers[0].num_slots,
            "width": memory.table.value_dim,
            "dtype": memory.table.dtype,
            "blocks": memory.num_blocks if not memory.reads_apart else 1,
            "readers": [site.name for site in readers],
            "cards": {str(slot): card for slot, card in cards[table].items()},
        }
        if table in curves:
            tables[table]["curves"] = {name: _thinned(*curve) for name, curve in curves[table].items()}
        if corpus is not None:
            counts = corpus.tables[table].counts
            tables[table]["counts"] = {
                str(slot): int(counts[slot])
                for slot in traced.slots_of(table).tolist()
                if slot not in cards[table]
            }
            tables[table]["usage"] = _usage(counts, most)
    return tables


def _usage(counts: np.ndarray, most: int) -> JsonDict | None:
    if not counts.any():
        return None
    found = usage(counts, most)
    return {
        "reads": found.num_reads,
        "never": rounded(found.never_read_share),
        "top": rounded(found.top_share),
        "entropy": rounded(found.entropy),
        "entropy_share": rounded(found.entropy_share),
        "most": [[int(s), int(n)] for s, n in zip(found.most_read, found.most_counts, strict=True)],
        "ranks": found.ranks.tolist(),
        "counts": found.rank_counts.tolist(),
    }


def _thinned(steps: list[int], values: list[float]) -> list[list[Any]]:
    """Returns a curve of limited length, with its last point."""
    every = -(-len(steps) // _CURVE_POINTS)
    kept = [*range(0, len(steps) - 1, every), len(steps) - 1]
    return [[steps[i] for i in kept], [rounded(values[i]) for i in kept]]
