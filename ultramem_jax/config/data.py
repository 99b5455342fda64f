"""Configures what a model is trained on: corpus, tokenizer and sequence length."""

from dataclasses import dataclass
from typing import Literal

from ultramem_jax.config.field_types import Checked, FilePath
from ultramem_jax.config.limits import LARGEST
from ultramem_jax.errors import at_least, require


@dataclass(frozen=True)
class DataConfig(Checked):
    """What is read. Splits, tokenizers and files are described in `ultramem_jax.data`."""

    PREFIX = "data."

    dataset: str = "stdlib"
    """`stdlib` (this Python's own sources), `enwik8` or `text` (both by `path`), or `tfds:NAME`."""
    path: FilePath = ""
    """A file or folder for `enwik8` (plain or .gz) and `text`; for `tfds:NAME` TFDS' own, or empty."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """`bytes`, or `bpe`: byte-pair encoding trained on the corpus' training split."""
    bpe_vocab_size: int = 8192
    """Vocabulary of `bpe`, end-of-document token included."""
    seq_len: int = 256
    """S, tokens that a sequence predicts."""
    cache_dir: FilePath = ""
    """Where prepared corpora are kept; empty: $ULTRAMEM_CACHE, else ~/.cache/ultramem_jax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, data__seq_len=self.seq_len)
        at_least(258, data__bpe_vocab_size=self.bpe_vocab_size)
        most = LARGEST["vocab_size"]
        require(
            self.bpe_vocab_size <= most,
            "data.bpe_vocab_size",
            self.bpe_vocab_size,
            f"must be at most {most:,}",
        )
