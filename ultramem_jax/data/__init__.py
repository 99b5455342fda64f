"""Turns text into batches of token ids.

`sources` says where documents come from and which split each belongs to. `tokenizers` turns them into ids
with a vocabulary of their own, and `tokenizer_files` opens the tokenizers of other models. `builder` writes a
corpus once, as files of tokens in a cache (`token_files`). `pipeline` reads it as sequences of S + 1 tokens:
a shuffled, endless, resumable stream for training, and a fixed order for evaluation.
"""

from ultramem_jax.data.file_tokenizers import FileTokenizer
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
from ultramem_jax.data.tokenizer_files import open_tokenizer
from ultramem_jax.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer

__all__ = [
    "SPLITS",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "EvalBatches",
    "FileTokenizer",
    "PeekingIterator",
    "SequenceSource",
    "Tokenizer",
    "eval_batches",
    "load_corpus",
    "open_tokenizer",
    "train_iterator",
]
