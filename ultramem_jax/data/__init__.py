"""Turns text into batches of token ids.

`sources` says where documents come from and which split each belongs to. `tokenizers` turns them into ids.
`builder` writes a corpus once, as files of tokens in a cache (`token_files`). `pipeline` reads it as
sequences of S + 1 tokens: a shuffled, endless, resumable stream for training, and a fixed order for
evaluation.
"""

from ultramem_jax.data.pipeline import (
    Corpus,
    EvalBatches,
    PeekingIterator,
    SequenceSource,
    eval_batches,
    load_corpus,
    train_iterator,
)
from ultramem_jax.data.sources import SPLITS
from ultramem_jax.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer

__all__ = [
    "SPLITS",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "EvalBatches",
    "PeekingIterator",
    "SequenceSource",
    "Tokenizer",
    "eval_batches",
    "load_corpus",
    "train_iterator",
]
