"""Measures how well models predict fixed texts, in bits per byte, each model with its own tokenizer.

Every document of a text is preceded by what the tokenizer puts before documents, and every token of it is
predicted once. Ends of documents are not predicted: models differ in the token that stands for them.
"""

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from experiments.open_models.records import Quality, Text
from ultramem_jax.accounting import count_parameters
from ultramem_jax.config import ModelConfig
from ultramem_jax.data import Tokenizer
from ultramem_jax.data.sources import Source, enwik8_source, stdlib_source
from ultramem_jax.models.scoring import Scorer
from ultramem_jax.tree_types import ArrayTree

_BATCH = 4
"""Windows that are read together."""


def enwik8_text(path: str, num_bytes: int) -> list[bytes]:
    """Returns the first bytes of enwik8's test split, as one document.

    Raises:
        UserError: the path does not name enwik8.
    """
    return _first_bytes(enwik8_source(path), num_bytes)


def stdlib_text(num_bytes: int) -> list[bytes]:
    """Returns the first files of the standard library's test split, of `num_bytes` together.

    The last file is cut.

    Raises:
        UserError: this Python has no sources.
    """
    return _first_bytes(stdlib_source(), num_bytes)


def _first_bytes(source: Source, num_bytes: int) -> list[bytes]:
    found: list[bytes] = []
    for document in source.documents("test"):
        left = num_bytes - sum(map(len, found))
        if left == 0:
            break
        if document.data:
            found.append(document.data[:left])
    return found


def describe_text(name: str, documents: Sequence[bytes]) -> Text:
    """Returns what identifies a text."""
    digest = hashlib.sha256(b"\0".join(documents)).hexdigest()
    return Text(name, sum(map(len, documents)), len(documents), digest)


def windows(start: Sequence[int], ids: np.ndarray, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields contexts and continuations that cover a document.

    The first window has the document's first tokens. Each of the others predicts up to `longest` // 2 further
    tokens, after at least `longest` - `longest` // 2 tokens.

    Args:
        start: ids that stand before the document.
        ids: the document.
        longest: most tokens that the model reads at once, more than `start` has.
    """
    stride = longest // 2
    ids = np.concatenate([np.asarray(start, np.int32), ids])
    # The last token is only predicted, so a window has one more than the model reads.
    yield ids[: len(start)], ids[len(start) : longest + 1]
    for begin in range(longest + 1, len(ids), stride):
        end = min(begin + stride, len(ids))
        yield ids[end - longest - 1 : begin], ids[begin:end]


def measure(
    name: str,
    config: ModelConfig,
    variables: dict[str, ArrayTree],
    tokenizer: Tokenizer,
    context: int,
    texts: dict[str, list[bytes]],
    *,
    trained_on: str,
) -> list[Quality]:
    """Returns how well a model predicts each text.

    Args:
        name: name of the model.
        config: the model's config.
        variables: its `params`, `memory` and `buffers`.
        tokenizer: the tokenizer that it was trained with.
        context: most tokens that it reads at once.
        texts: documents by name of the text.
        trained_on: text that it was trained on, in words.
    """
    scorer = Scorer(config, variables, max_length=context, batch_size=_BATCH)
    found = []
    for text, documents in texts.items():
        encoded = [tokenizer.encode(document) for document in documents]
        pairs = [pair for ids in encoded for pair in windows(tokenizer.start_ids, ids, context)]
        scores = tqdm(
            scorer.stream(pairs), f"{name}, {text}", len(pairs), unit="window", file=sys.stderr, leave=False
        )
        found.append(
            Quality(
                model=name,
                trained_on=trained_on,
                parameters=count_parameters(config).total,
                context=context,
                text=text,
                num_bytes=sum(map(len, documents)),
                tokens=sum(map(len, encoded)),
                nats=-math.fsum(score.total for _, score in scores),
            )
        )
    return found
