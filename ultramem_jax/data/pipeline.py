"""Reads sequences and batches of a corpus.

It offers random access, a resumable shuffled stream for training, and a fixed order for evaluation. Sequence
i of a split begins at token i·stride and has S + 1 tokens, so that S inputs have S targets. In training the
stride is S: the last token of a sequence is the first of the next, and every token but the first is a target
once.

An evaluation may use a smaller stride. Then sequences are a window that slides over the split. All targets of
the first sequence are new, and the last `stride` targets of every other one. Only new targets count. So again
every target counts once, but with at least S - stride tokens before it in its sequence. What remains at the
end, fewer targets than the stride, is in no sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from ultramem_jax.config import DataConfig
from ultramem_jax.data import builder
from ultramem_jax.data.sources import SPLITS
from ultramem_jax.data.token_files import open_tokens, read_description
from ultramem_jax.data.tokenizers import Tokenizer
from ultramem_jax.errors import UserError, require, unknown
from ultramem_jax.parallel.distributed import first_before_others

_READ_THREADS = 2
_BATCHES_AHEAD = 8


class SequenceSource:
    """Gives random access to the sequences of one split, each (S + 1,) int32."""

    def __init__(self, tokens: np.ndarray, seq_len: int, stride: int):
        """Reads a split (num_tokens,) that has at least one sequence. `Corpus.source` makes and checks it."""
        self._tokens, self.seq_len, self._stride = tokens, seq_len, stride
        self._num_sequences = 1 + (len(tokens) - 1 - seq_len) // stride

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, i: int) -> np.ndarray:
        """Returns sequence i.

        Raises:
            IndexError: i is not in [0, len(self)).
        """
        if not 0 <= i < self._num_sequences:
            raise IndexError(f"sequence {i} of {self._num_sequences}")
        return self.read([i])[0]

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the sequences `indices`, (len(indices), S + 1) int32."""
        length = self.seq_len + 1
        sequences = np.empty((len(indices), length), np.int32)
        for row, i in zip(sequences, indices, strict=True):
            start = int(i) * self._stride
            row[:] = self._tokens[start : start + length]
        return sequences

    def new_targets(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns which targets of the sequences `indices` are new, (len(indices), S) bool.

        A target is new if no sequence before has it.
        """
        first = np.asarray(indices)[:, None] == 0
        return first | (np.arange(self.seq_len) >= self.seq_len - self._stride)


@dataclass(frozen=True)
class Corpus:
    """Describes a tokenized corpus in the cache, and opens its splits. `load_corpus` makes it."""

    tokenizer: Tokenizer
    seq_len: int
    """S, the length of a sequence in targets."""
    corpus_hash: str
    """The sha256 over split, name and bytes of every document. It says which data a result was measured
    on."""
    num_tokens: dict[str, int]
    """Tokens per split, with those that begin and end each document."""
    num_bytes: dict[str, int]
    """Bytes of the documents, per split."""
    folder: Path
    """Folder of the corpus in the cache."""

    def source(self, split: str, stride: int | None = None) -> SequenceSource:
        """Returns the sequences of `train`, `validation` or `test`.

        Args:
            split: the name of the split.
            stride: tokens from the beginning of a sequence to that of the next, in [1, S]; None is S.

        Raises:
            UserError: another stride; for the split see `require_sequences`.
        """
        stride = self.checked_stride(stride)
        self.require_sequences(split)
        return SequenceSource(open_tokens(self.folder, split), self.seq_len, stride)

    def checked_stride(self, stride: int | None) -> int:
        """Returns the stride to use; None is S.

        Raises:
            UserError: the stride is not in [1, S].
        """
        if stride is None:
            return self.seq_len
        allowed = f"must be in [1, {self.seq_len}], the length of a sequence (data.seq_len)"
        require(1 <= stride <= self.seq_len, "--stride", stride, allowed)
        return stride

    def require_sequences(self, split: str) -> None:
        """Refuses a split that has no sequence.

        Raises:
            UserError: an unknown split, or one with fewer than S + 1 tokens.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        size = self.num_tokens[split]
        if size == 0:
            raise UserError(
                f"data.path: no text of this corpus falls into its {split} split (a folder is split by the "
                "names of its files); give more text, or one file in place of a few; of `facts`, more people"
            )
        allowed = f"a sequence needs seq_len + 1 tokens, the {split} split of this corpus has {size:,}"
        require(size > self.seq_len, "data.seq_len", self.seq_len, allowed)


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Returns the corpus that `config` describes, and tokenizes it into the cache first if needed.

    If several processes have joined, the first one looks first. So it is the one that shows the progress.

    Args:
        config: describes the corpus.
        tokenizer: the tokenizer of the file that `config.tokenizer` names, such as the copy in the folder of
            a run; None opens the file. It is ignored where `config.tokenizer` names none.

    Raises:
        UserError: see `builder.prepare`.
    """
    if config.tokenizer in ("bytes", "bpe"):
        tokenizer = None
    elif tokenizer is None:
        tokenizer = builder.file_tokenizer(config)
    with first_before_others():
        folder = builder.prepare(config, tokenizer)
    description = read_description(folder)
    return Corpus(
        tokenizer=builder.load_tokenizer(config, folder) if tokenizer is None else tokenizer,
        seq_len=config.seq_len,
        corpus_hash=description["corpus_hash"],
        num_tokens=description["num_tokens"],
        num_bytes=description["num_bytes"],
        folder=folder,
    )


def train_iterator(
    corpus: Corpus, batch_size: int, seed: int, rows: np.ndarray | None = None
) -> grain.DatasetIterator:
    """Returns endless batches {"tokens": (len(rows), S + 1) int32} of the training split.

    Every epoch is a new permutation of all sequences; a batch may span two. Batch t depends only on `seed`
    and t, and the iterator's state is t. So the state means the same in every process, however many processes
    there are and whichever rows of the batches they read.

    Args:
        corpus: see `load_corpus`.
        batch_size: sequences per batch, over all processes.
        seed: seed of the order; any non-negative integer.
        rows: the rows of each batch that this process needs, increasing (`parallel.mesh.rows_here`); None is
            all.

    Raises:
        UserError: a training split shorter than one sequence, or an empty batch.
    """
    require(batch_size > 0, "train.batch_size", batch_size, "must be at least 1")
    rows = _checked(rows, batch_size)
    source = corpus.source("train")

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"tokens": source.read(indices[rows])}

    # grain takes 32 bits and adds the epoch to them. Unspread, neighbouring seeds would share their epochs,
    # shifted by one.
    spread_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    # Batches hold indices, not sequences, so that a process reads only its own rows.
    # An endless stream has no remainder. drop_remainder only keeps grain from rounding its length
    # (sys.maxsize) up.
    order = grain.MapDataset.range(len(source)).shuffle(spread_seed).repeat()
    batches = order.batch(batch_size, drop_remainder=True).map(read)
    options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
    return iter(batches.to_iter_dataset(options))


@dataclass(frozen=True)
class EvalBatches:
    """Yields batches in a fixed order, as often as asked. `eval_batches` makes it.

    A batch is {"tokens": (rows, S + 1) int32, "mask": (rows, S) float32}.
    """

    source: SequenceSource
    indices: np.ndarray
    """Indices of all sequences, in the order of the batches."""
    batch_size: int
    rows: np.ndarray
    """Rows of each batch that are read here."""

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self.indices), self.batch_size):
            there = start + self.rows < len(self.indices)
            indices = self.indices[start + self.rows[there]]
            tokens = np.zeros((len(self.rows), self.source.seq_len + 1), np.int32)
            mask = np.zeros((len(self.rows), self.source.seq_len), np.float32)
            tokens[there] = self.source.read(indices)
            mask[there] = self.source.new_targets(indices)
            yield {"tokens": tokens, "mask": mask}

    def texts(self) -> Iterator[np.ndarray]:
        """Yields the ids (B, S) int32 of each batch; the last one has fewer rows if sequences run out."""
        for batch in self:
            there = batch["mask"].any(1)
            yield batch["tokens"][there, :-1]


def eval_batches(
    corpus: Corpus,
    split: str,
    batch_size: int,
    limit: int = 0,
    rows: np.ndarray | None = None,
    stride: int | None = None,
) -> EvalBatches:
    """Returns batches of a split for evaluation, the same ones each time.

    The mask is 1 for targets that count: those that no earlier sequence of the split has. It is 0 for the
    others, and for the rows of zeros that pad the last batch. With a `limit`, the sequences are spread evenly
    over the split, whose beginning may not be like the rest. The targets that count are the same.

    Args:
        corpus: see `load_corpus`.
        split: `train`, `validation` or `test`.
        batch_size: rows per batch, over all processes.
        limit: the most batches; 0 is the whole split, each sequence once.
        rows: the same as in `train_iterator`.
        stride: the same as in `Corpus.source`.

    Raises:
        UserError: an empty batch, a negative limit; for split and stride see `Corpus.source`.
    """
    require(batch_size > 0, "train.batch_size", batch_size, "must be at least 1")
    require(limit >= 0, "train.eval_batches", limit, "must be at least 0")
    rows = _checked(rows, batch_size)
    source = corpus.source(split, stride)
    count = min(limit * batch_size, len(source)) if limit else len(source)
    return EvalBatches(source, np.arange(count) * len(source) // count, batch_size, rows)


def _checked(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    rows = np.arange(batch_size) if rows is None else rows
    if not (len(rows) and rows[0] >= 0 and rows[-1] < batch_size and (np.diff(rows) > 0).all()):
        raise ValueError(f"rows = {rows}: must be rising numbers in [0, {batch_size})")
    return rows


class PeekingIterator:
    """Iterates over batches, shows the next one before it is taken, and keeps a position as Grain's do."""

    def __init__(self, iterator: grain.DatasetIterator):
        """Wraps an iterator, which must not be used by itself afterwards."""
        self._iterator = iterator
        self._next: dict[str, np.ndarray] | None = None
        self._position: dict[str, Any] | None = None
        """Position before the batch that was shown."""

    def __iter__(self) -> "PeekingIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._next is None:
            return next(self._iterator)
        batch, self._next, self._position = self._next, None, None
        return batch

    def peek(self) -> dict[str, np.ndarray]:
        """Returns the next batch, which stays the next one."""
        if self._next is None:
            self._position = dict(self._iterator.get_state())
            self._next = next(self._iterator)
        return self._next

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the next batch."""
        return dict(self._iterator.get_state()) if self._position is None else self._position

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        self._next = self._position = None
        self._iterator.set_state(state)

    def start_prefetch(self) -> None:
        """Starts to read batches in the background."""
        self._iterator.start_prefetch()
