"""Configures the training data: corpus, tokenizer and sequence length."""

from dataclasses import dataclass

from ultramem_jax.config.field_types import Checked, FilePath
from ultramem_jax.config.limits import LARGEST
from ultramem_jax.errors import at_least, require


@dataclass(frozen=True)
class DataConfig(Checked):
    """Configures the data that a run reads. `ultramem_jax.data` describes splits, tokenizers and files."""

    PREFIX = "data."

    dataset: str = "stdlib"
    """Corpus: `stdlib` (the sources of Python's standard library), `enwik8` or `text` (both read from
    `path`), `tfds:NAME`, or `facts:FIRST-END[xCOPIES][@SEED]` (biographies of the made-up people FIRST to
    END - 1, each in COPIES paraphrases; see `data.facts`)."""
    path: FilePath = ""
    """File or folder of `enwik8` (plain or .gz) or `text`; for `tfds:NAME` the data folder of TFDS, or empty
    for its default."""
    tokenizer: FilePath = "bytes"
    """Tokenizer: `bytes`; `bpe`, byte-pair encoding trained on the training split of the corpus; or that of
    another model: a `tokenizer.json`, a folder that holds one, or a GGUF file."""
    bpe_vocab_size: int = 8192
    """Vocabulary size of `bpe`, with the end-of-document token."""
    seq_len: int = 256
    """S, tokens that the model predicts in a sequence."""
    cache_dir: FilePath = ""
    """Folder of prepared corpora; if empty, $ULTRAMEM_CACHE, or else ~/.cache/ultramem_jax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokenizer != "", "data.tokenizer", self.tokenizer, "must be 'bytes', 'bpe' or a file")
        at_least(2, data__seq_len=self.seq_len)
        at_least(258, data__bpe_vocab_size=self.bpe_vocab_size)
        most = LARGEST["vocab_size"]
        require(
            self.bpe_vocab_size <= most,
            "data.bpe_vocab_size",
            self.bpe_vocab_size,
            f"must be at most {most:,}",
        )
